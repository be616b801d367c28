"""The file that names submodules of the diffusion model; `checkpoints.py` has their names in other people's files."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` wraps, whose parameters it shares, or the module itself."""
    return getattr(module, "_orig_mod", module)


def check_uncompiled(part: str, module: nn.Module) -> None:
    """ValueError where a part of the pipeline or a layer of it is compiled: such code keeps to the hooks of its first
    call.
    """
    inside = [one for one in uncompiled(module).modules() if one._compiled_call_impl is not None]
    if inside or uncompiled(module) is not module:
        raise ValueError(
            f"the {part} is compiled, and its code would neither take a filter that comes later nor drop one that it "
            "was compiled with: load the model again, and use filters without torch.compile"
        )


def check_unfused(unet: nn.Module) -> None:
    """ValueError while projections are fused: the UNet then computes with copies of the weights that edits change."""
    for name, module in unet.named_modules():
        # not module.fused_projections: unfusing leaves that True (diffusers 0.42)
        if isinstance(getattr(module, "processor", None), FusedAttnProcessor2_0):
            raise ValueError(
                f"the projections of {name} are fused, and an edit would change weights that are not in use: "
                "call unet.unfuse_qkv_projections() first"
            )


def drop_unfused(module: nn.Module) -> None:
    """Delete what `unfuse_qkv_projections` leaves in a UNet and a VAE (diffusers 0.42): copies of the weights from
    before, with which nothing computes, and which would count in a fingerprint and be saved.
    """
    for one in [one for one in module.modules() if isinstance(one, Attention)]:
        if not type(one.processor).__name__.startswith("Fused"):
            for name in {"to_qkv", "to_kv", "to_added_qkv"} & one._modules.keys():
                delattr(one, name)


def unmerge(module: nn.Module) -> bool:
    """Take every fused LoRA or other adapter out of the weights again, to rounding; whether there was one."""
    merged = [one for one in module.modules() if isinstance(one, BaseTunerLayer) and one.merged]
    for one in merged:
        one.unmerge()
    return bool(merged)


def check_editable(part: str, module: nn.Module) -> None:
    """ValueError, with what to do, where the weights of a part of the pipeline are not plain tensors that it computes
    with: projections fused, an adapter loaded, weights quantized or offloaded, attention with weights of its own.
    """
    check_unfused(module)
    for name, one in module.named_modules():
        where = f"{part}.{name}"
        if isinstance(one, BaseTunerLayer):
            raise ValueError(
                f"a LoRA or another adapter is loaded in {where}: to drop it call pipeline.unload_lora_weights(), to "
                "keep it pipeline.fuse_lora() before that; then load the model again with ek.load(pipeline)"
            )
        if _quantized(one):
            raise ValueError(f"{where} is a {type(one).__module__}.{type(one).__name__}: {UNQUANTIZED}")
        _check_processor(where, one)
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{part}.{name} has no data in memory: load the model without offloading to disk or layer by layer "
                "(enable_model_cpu_offload, a whole part at a time, works), edit it, and offload what `merged` returns"
            )
        if type(parameter) is not nn.Parameter or parameter.dtype not in FLOATS:
            kind = f"{type(parameter).__name__}, {parameter.dtype}"
            raise ValueError(f"{part}.{name} is quantized ({kind}): {UNQUANTIZED}")


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UNQUANTIZED = "load the model in float16, bfloat16 or float32, edit it, and quantize what `merged` returns"


def _quantized(module: nn.Module) -> bool:
    """Linear or convolution of a quantization library; some keep float weights until they are frozen."""
    package = type(module).__module__
    if package.startswith("torch.ao.nn"):
        return True
    ours = package.split(".")[0] in ("torch", "diffusers", "transformers")
    return isinstance(module, (nn.Linear, nn.Conv2d)) and not ours


def _check_processor(where: str, module: nn.Module) -> None:
    """ValueError for an attention processor that brings weights, or does without the keys and values."""
    processor = getattr(module, "processor", None)
    if not isinstance(module, Attention) or isinstance(processor, _Recorder):
        return
    if isinstance(processor, nn.Module) and any(True for _ in processor.parameters()):
        raise ValueError(
            f"the attention processor of {where} ({type(processor).__name__}) has weights of its own, as an IP-Adapter "
            "has: take it out (pipeline.unload_ip_adapter(), unet.set_default_attn_processor()), edit the model, and "
            "load it into what `merged` returns"
        )
    if not type(processor).__module__.startswith("diffusers."):
        unused = [name for name in ("to_k", "to_v") if not _calls(module, getattr(module, name, None))]
        if unused:
            raise ValueError(
                f"the attention processor of {where} ({type(processor).__name__}) computes without {unused[0]}, so "
                "that an edit of it would change nothing: call unet.set_default_attn_processor() first"
            )


@torch.no_grad()
def _calls(attention: Attention, layer: nn.Module | None) -> bool:
    """Whether a call of the attention comes by the layer."""
    if layer is None:
        return True
    seen = []
    hook = layer.register_forward_hook(lambda *_: seen.append(True))
    zeros = lambda width: torch.zeros(1, 4, width, device=layer.weight.device, dtype=layer.weight.dtype)
    try:
        attention(zeros(attention.query_dim), encoder_hidden_states=zeros(layer.in_features))
    finally:
        hook.remove()
    return bool(seen)


def cross_attention(unet: nn.Module) -> dict[str, Attention]:
    """{module name: Attention} of every cross-attention (`attn2`), in registration order."""
    found = {
        name: module
        for name, module in unet.named_modules()
        if name.split(".")[-1] == "attn2" and isinstance(module, Attention)
    }
    if not found:
        raise ValueError(
            f"no cross-attention named attn2 in {type(unet).__name__}: expected a diffusers UNet"
        )
    return found


Projections = Literal["values", "keys", "both"]


def cross_attention_kv(unet: nn.Module, only: Projections = "both") -> dict[str, nn.Linear]:
    """{parameter name: Linear} of every cross-attention key and value projection, in registration order; or `only` of
    the keys, or of the values.

    The names end in `attn2.to_k.weight` and `attn2.to_v.weight`; every weight is (d_out, d) with one shared
    d. Raises ValueError when there is none, or when one is not a plain bias-free Linear of that width.
    """
    found = _text_projections(unet)
    if not found:
        raise ValueError(f"no attn2.to_k or attn2.to_v in {type(unet).__name__}: expected a diffusers UNet")
    for name, module in found.items():
        if type(module) is not nn.Linear:
            raise ValueError(
                f"{name} belongs to a {type(module).__name__}, expected torch.nn.Linear: "
                "unload or fuse LoRA adapters and undo quantization first"
            )
        if module.bias is not None:
            raise ValueError(f"{name} has a bias; cross-attention keys and values are expected to have none")
    widths = {module.in_features for module in found.values()}
    if len(widths) > 1:
        raise ValueError(
            f"cross-attention inputs differ in width ({sorted(widths)}); expected one text width"
        )
    wanted = {"values": ("to_v",), "keys": ("to_k",), "both": ("to_k", "to_v")}[only]
    return {name: module for name, module in found.items() if name.split(".")[-2] in wanted}


def _text_projections(unet: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{name}.weight": module
        for name, module in unet.named_modules()
        if name.split(".")[-2:] in (["attn2", "to_k"], ["attn2", "to_v"])
    }


@contextmanager
def text_projected_once(unet: nn.Module) -> Iterator[None]:
    """Inside the block each thread projects a text to keys and values once, not anew in every denoising step.

    A projection that is called with the very tensor of its last call returns the very result: bit for bit the same,
    and for a model as small as the emoji world's a tenth of the time. Weights must not change inside the block.
    """

    def once(forward: Callable) -> Callable:
        last = threading.local()

        def call(x: Tensor, *args, **kwargs) -> Tensor:
            if getattr(last, "x", None) is not x:
                last.x, last.y = x, forward(x, *args, **kwargs)
            return last.y

        return call

    layers = [layer for layer in _text_projections(unet).values() if "forward" not in vars(layer)]
    try:
        for layer in layers:
            layer.forward = once(layer.forward)
        yield
    finally:
        for layer in layers:
            del layer.forward


def sharing(parameters: Iterable[nn.Parameter]) -> dict[int, nn.Parameter]:
    """The memo with which `copy.deepcopy` gives a copy parameters of its own in the memory of these."""
    return {id(one): nn.Parameter(one.detach(), one.requires_grad) for one in parameters}


@contextmanager
def channels_last(*modules: nn.Module) -> Iterator[None]:
    """Inside the block the kernels of convolutions lie in memory as a CPU likes them, channels last; elsewhere, and
    afterwards, as before. The emoji world's UNet takes a fifth less time on some processors and a tenth more on others.

    Kernels that share their memory still do. Those that a gradient is about to reach stay: they lie as the moments of
    their optimizer do.
    """
    kernels = {
        id(parameter): parameter
        for module in modules
        for parameter in module.parameters()
        if parameter.ndim == 4 and parameter.device.type == "cpu" and parameter.is_contiguous()
        and not (parameter.requires_grad and torch.is_grad_enabled())
    }  # fmt: skip

    def lay(memory_format: torch.memory_format) -> None:
        moved = {}
        for kernel in kernels.values():
            place = kernel.data_ptr()
            if place not in moved:
                moved[place] = kernel.data.contiguous(memory_format=memory_format)
            kernel.data = moved[place]

    try:
        lay(torch.channels_last)
        yield
    finally:
        lay(torch.contiguous_format)


def text_backbone(text_encoder: nn.Module) -> nn.Module:
    """The module with `embeddings`, `encoder` and `final_layer_norm`.

    A `CLIPTextModel` is that module itself since transformers 5.6; `CLIPTextModelWithProjection` (and the
    `CLIPTextModel` of before) keeps it under `text_model`.
    """
    backbone = getattr(text_encoder, "text_model", text_encoder)
    if not all(hasattr(backbone, part) for part in ("embeddings", "encoder", "final_layer_norm")):
        raise ValueError(f"expected a CLIP text model, got {type(text_encoder).__name__}")
    return backbone


def token_table(text_encoder: nn.Module) -> Tensor:
    """The embedding (vocabulary, d) of every token, without a gradient."""
    return text_backbone(text_encoder).embeddings.token_embedding.weight.detach()


def unet_parameters(unet: nn.Module, which: str) -> list[str]:
    """Names of the UNet parameters that a method trains, by the names of ESD's code.

    "x": all of cross-attention; "x-strict": its keys and values; "u": everything but cross-attention, the time
    embedding and the last convolution; "self": self-attention; "full": everything. And TRCE's "visual":
    self-attention and the queries of cross-attention. ValueError for another name.
    """
    outside = ("time_embedding.", "conv_out.", "time_embed.", "proj_out.")  # the latter two of Sana
    chosen = {
        "x": lambda name: ".attn2." in name,
        "x-strict": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
        "u": lambda name: ".attn2." not in name and not name.startswith(outside),
        "self": lambda name: ".attn1." in name,
        "visual": lambda name: ".attn1." in name or ".attn2.to_q." in name,
        "full": lambda name: True,
    }
    if which not in chosen:
        raise ValueError(f"parameters must be one of {', '.join(chosen)}, got {which!r}")
    names = [name for name, _ in unet.named_parameters() if chosen[which](name)]
    if not names:
        raise ValueError(f"no parameters {which!r} in {type(unet).__name__}: expected a diffusers UNet")
    return names


ATTENTION = ("attn", "attention")


def denoiser_parameters(denoiser: nn.Module, which: str) -> list[str]:
    """Names of the parameters of a UNet or a transformer that a method trains.

    Where text is read by cross-attention (UNets, Sana) those of `unet_parameters`. Where text and picture attend in one
    softmax (SD 3, FLUX.1) no layer of attention is the text's alone: "x" is then every linear layer of attention, as in
    ESD's code for FLUX; "x-strict" its keys and values, those of the text's own stream with them (ours); "full"
    everything. ValueError for another name.
    """
    if any(".attn2." in name for name, _ in denoiser.named_parameters()):
        return unet_parameters(denoiser, which)
    last = ("to_k", "to_v", "add_k_proj", "add_v_proj")
    inside = {
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and any(part in ATTENTION for part in name.split("."))
    }
    chosen = {
        "x": lambda owner: owner in inside,
        "x-strict": lambda owner: owner in inside and owner.endswith(last),
        "full": lambda owner: True,
    }
    if which not in chosen:
        raise ValueError(
            f"parameters must be one of {', '.join(chosen)} in a {type(denoiser).__name__}, where text and picture "
            f"share their attention, got {which!r}"
        )
    names = [name for name, _ in denoiser.named_parameters() if chosen[which](name.rpartition(".")[0])]
    if not names:
        raise ValueError(f"no parameters {which!r} in {type(denoiser).__name__}: train 'full'")
    return names


def text_parameters(text_encoder: nn.Module, layers: int | None = None) -> list[str]:
    """Names of the parameters of the first `layers` transformer layers, or of all of them and the final norm (None).

    Token and position embeddings are never among them.
    """
    backbone = text_backbone(text_encoder)
    depth = len(backbone.encoder.layers)
    if layers is not None and not 1 <= layers <= depth:
        raise ValueError(f"this text encoder has {depth} layers, cannot train the first {layers}")
    modules = list(backbone.encoder.layers[: layers or depth])
    modules += [backbone.final_layer_norm] if layers is None else []
    wanted = {id(p) for module in modules for p in module.parameters()}
    return [name for name, p in text_encoder.named_parameters() if id(p) in wanted]


_ADDING = threading.Lock()  # a small model draws several batches at once


@dataclass
class AttentionMaps:
    """What `record_attention` saw: {layer: probabilities (batch, pixels, tokens)}, float32 on the CPU.

    Averaged over heads and over the calls (denoising steps). With guidance the first half of the batch is the
    unconditional one; the maps of the prompts start at row batch / 2, in order (a padded batch goes on after
    them).
    """

    layers: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def add(self, layer: str, probabilities: Tensor) -> None:
        """Fold one call's (batch, pixels, tokens) into the running mean."""
        with _ADDING:
            seen, mean = self.calls.get(layer, 0), self.layers.get(layer, 0.0)
            if seen and mean.shape != probabilities.shape:
                raise ValueError(
                    f"attention of shape {tuple(probabilities.shape)} after {tuple(mean.shape)}: "
                    "record one batch per record_attention block"
                )
            self.layers[layer] = mean + (probabilities.float().cpu() - mean) / (seen + 1)
            self.calls[layer] = seen + 1

    def heatmap(self, token: int, size: int | tuple[int, int] = 64) -> Tensor:
        """Attention paid to one token position, (batch, height, width): every layer resized, then averaged.

        size: height and width, or one number for both; their ratio is that of the pictures, ValueError where it is not.
        """
        if not self.layers:
            raise ValueError("nothing was recorded: generate inside the record_attention block")
        height, width = (size, size) if isinstance(size, int) else size
        maps = []
        for probabilities in self.layers.values():
            grid = grid_of(probabilities.shape[1], (height, width))
            one = probabilities[:, :, token].reshape(-1, 1, *grid)
            maps.append(F.interpolate(one, (height, width), mode="bilinear", align_corners=False)[:, 0])
        return torch.stack(maps).mean(0)


def grid_of(positions: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of that many positions of a picture of this height and width. ValueError where none fits."""
    rows = round((positions * size[0] / size[1]) ** 0.5)
    if rows < 1 or positions % rows or rows * size[1] != positions // rows * size[0]:
        raise ValueError(
            f"{positions} positions are no grid of ratio {size[0]} : {size[1]}: give the pictures' size"
        )
    return rows, positions // rows


class _Recorder:
    """An attention processor that notes softmax(q k^T) and leaves the result to the processor it wraps."""

    def __init__(self, wrapped, note: Callable[[Tensor], None]):
        self.wrapped, self.note = wrapped, note

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        scores = attn.get_attention_scores(query, key)  # (batch * heads, pixels, tokens)
        self.note(scores.unflatten(0, (-1, attn.heads)))
        return self.wrapped(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


@contextmanager
def record_attention(unet: nn.Module) -> Iterator[AttentionMaps]:
    """Record every cross-attention map of the UNet calls made inside the block.

    The pictures are the same with and without recording; the processors are put back on exit.
    """
    maps = AttentionMaps()
    with _recording(unet, lambda name, seen: maps.add(name, seen.detach().mean(1))):
        yield maps


@contextmanager
def attention_with_gradient(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """{layer: probabilities (batch, heads, pixels, tokens)} of the last UNet call inside the block, with gradient."""
    seen: dict[str, Tensor] = {}
    with _recording(unet, seen.__setitem__):
        yield seen


@contextmanager
def first_attention(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """{layer: probabilities (batch, heads, pixels, tokens)} of the first UNet call inside the block, and of the first
    one after each `clear()` of the dict. A guidance filter calls the UNet again in every step, for texts of its own:
    the first call is that of the prompt.
    """
    seen: dict[str, Tensor] = {}
    with _recording(unet, seen.setdefault):
        yield seen


@contextmanager
def _recording(unet: nn.Module, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    modules = cross_attention(unet)
    before = {name: module.processor for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.set_processor(_Recorder(before[name], partial(note, name)))
        yield
    finally:
        for name, module in modules.items():
            module.set_processor(before[name])


@contextmanager
def embedded_as(text_encoder: nn.Module, ids: Tensor, rows: Tensor) -> Iterator[None]:
    """Inside the block the text encoder, called with `ids` (n, length), finds `rows` (n, length, d) for embeddings.

    Positions, causal mask and final layer norm are the encoder's own; gradients reach `rows`.
    """
    embedding = text_backbone(text_encoder).embeddings.token_embedding
    if rows.shape != (*ids.shape, embedding.embedding_dim):
        raise ValueError(
            f"expected rows {(*ids.shape, embedding.embedding_dim)} for these ids, got {tuple(rows.shape)}"
        )
    hook = embedding.register_forward_hook(lambda *_: rows.to(embedding.weight.dtype))
    try:
        yield
    finally:
        hook.remove()
