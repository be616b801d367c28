"""How well erasure worked: pure metrics, and pictures drawn and judged in the emoji world."""
