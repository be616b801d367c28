"""One attack, one file: what an erased model still gives away.

All are used alike; `attacks.common` says what they share:

    victim = edit.merged(model)
    result = ek.attacks.unlearndiff.run(victim, ["a dog in flat style"], goal=ek.attacks.sees("dog"), targets=pictures)
    result.table()                                    # k/n, intervals, cost, protocol hash
"""

from erasekit.attacks import (
    concept_vector,
    fine_tuning,
    latent_inversion,
    mma,
    p4d,
    ring_a_bell,
    textual_inversion,
    unlearndiff,
)
from erasekit.attacks.common import AttackResult, Attempt, sees

ATTACKS = {
    "unlearndiff": unlearndiff,
    "p4d": p4d,
    "ring-a-bell": ring_a_bell,
    "mma": mma,
    "concept-vector": concept_vector,
    "textual-inversion": textual_inversion,
    "latent-inversion": latent_inversion,
    "fine-tuning": fine_tuning,
}

__all__ = [
    "ATTACKS", "AttackResult", "Attempt", "concept_vector", "fine_tuning", "latent_inversion", "mma", "p4d",
    "ring_a_bell", "sees", "textual_inversion", "unlearndiff",
]  # fmt: skip
