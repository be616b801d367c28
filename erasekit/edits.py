"""Edit: what a method returns. It is small, named, reversible, and knows the model it belongs to."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from erasekit import __version__, checkpoints, filters, models
from erasekit.closed_form import ContextMap
from erasekit.filters import FilterKind
from erasekit.layers import check_unfused, cross_attention_kv, uncompiled, unmerge
from erasekit.models import DiffusionModel
from erasekit.paths import named_safetensors, replacing
from erasekit.text_entries import TextEntry

Kind = Literal["context_map", "text_maps", "weight_delta", "text_encoder", FilterKind]
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Edit:
    """A change to a model, kept apart from the model.

    kind "context_map": tensors `left` and `right`, (d, r) float32, the factors of T = I + left right^T; every
    cross-attention key and value weight W becomes W T. kind "text_maps": one such map for each space that text entries
    read (`text_entries`), tensors `NAME.left` and `NAME.right`; metadata `entries` says {NAME: its weights, and the
    columns of them that the map acts on}. kind "weight_delta": {parameter name, with the
    pipeline part in front: tensor of the parameter's shape}, added to it; with `left` and `right` beside them the
    map comes first, as in an edit of two stages. kind "text_encoder": the same for
    parameters of the text encoder alone; it may be applied to any model with that text encoder. kinds
    "prompt_filter", "attention_filter" and "guidance_filter" change no weight: see `filters`; metadata `filter`
    says {formula: its name, and its settings}; a prompt_filter and a guidance_filter may be applied where a
    "text_encoder" may. The tensors are on the CPU and are exactly what `save` writes, so pictures are the same
    before and after saving.

    metadata: method, config, concepts, base (fingerprint of the model it was made for), text_base (the same of its
    text encoder), text_bases (of all its text encoders, where there is more than that one), source (where that model
    came from), versions, license.
    """

    kind: Kind
    tensors: dict[str, Tensor]
    metadata: dict

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown kind of edit {self.kind!r}: expected {', '.join(get_args(Kind))}")
        if self.kind == "text_encoder" and (
            other := [n for n in self.tensors if not n.startswith("text_encoder.")]
        ):
            raise ValueError(f"{other[0]} is not in the text encoder: use the kind weight_delta")
        if self.kind in filters.KINDS:
            filters.check(self.kind, self.metadata.get("filter"))
        for name, tensor in self.tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{name} of this {self.kind} holds NaN or infinity: nothing usable was fitted"
                )

    @classmethod
    def from_context_map(cls, context_map: ContextMap, model: DiffusionModel, **metadata) -> "Edit":
        """Round a map to what is stored: balanced float32 factors of its rank in single precision."""
        small = context_map.compressed(rtol=1e-7)
        tensors = {"left": small.left.float().cpu(), "right": small.right.float().cpu()}
        return cls("context_map", tensors, _metadata(model, metadata))

    @classmethod
    def from_text_maps(
        cls,
        maps: Mapping[int, ContextMap],
        entries: Sequence[TextEntry],
        model: DiffusionModel,
        **metadata,
    ) -> "Edit":
        """maps: {space: map of what its entries read}, rounded as in `from_context_map`; spaces without one stay."""
        tensors, where = {}, {}
        for space, context_map in maps.items():
            own = [entry for entry in entries if entry.space == space]
            names = [f"{model.denoiser_part}.{entry.layer}" for entry in own]
            small = context_map.compressed(rtol=1e-7)
            tensors |= {
                f"{names[0]}.left": small.left.float().cpu(),
                f"{names[0]}.right": small.right.float().cpu(),
            }
            where[names[0]] = {
                "weights": [f"{name}.weight" for name in names],
                "columns": list(own[0].columns),
            }
        return cls("text_maps", tensors, _metadata(model, {**metadata, "entries": where}))

    @classmethod
    def from_weight_delta(
        cls,
        delta: Mapping[str, Tensor],
        model: DiffusionModel,
        context_map: ContextMap | None = None,
        **metadata,
    ) -> "Edit":
        """`delta`: {"unet.…weight": tensor added to that parameter}; of kind "text_encoder" when it changes nothing
        else. context_map: a first stage, applied before. ValueError for an unknown name or shape.
        """
        for name, tensor in delta.items():
            if (shape := _parameter(model, name).shape) != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(shape)}, its delta {tuple(tensor.shape)}")
        tensors = {name: _own(tensor.detach().cpu()) for name, tensor in delta.items()}
        if context_map is not None:
            tensors |= cls.from_context_map(context_map, model).tensors
        in_text = bool(tensors) and all(name.startswith("text_encoder.") for name in tensors)
        return cls("text_encoder" if in_text else "weight_delta", tensors, _metadata(model, metadata))

    @classmethod
    def from_filter(
        cls, tensors: Mapping[str, Tensor], settings: Mapping, model: DiffusionModel, **metadata
    ) -> "Edit":
        """settings: `formula`, one of `filters.FORMULAS`, which tells the kind, and the formula's own."""
        tensors = {name: _own(tensor.detach().float().cpu()) for name, tensor in tensors.items()}
        kind = filters.FORMULAS[settings["formula"]]
        return cls(kind, tensors, _metadata(model, {**metadata, "filter": dict(settings)}))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def maps(self) -> dict[str, ContextMap]:
        """{NAME: map} of a text_maps edit, in float64; NAME is the first layer that reads the map's space."""
        if self.kind != "text_maps":
            raise ValueError(f"a {self.kind} edit has no maps of text entries")
        pair = lambda name: (self.tensors[f"{name}.{side}"].double() for side in ("left", "right"))
        return {name: ContextMap(*pair(name)) for name in self.metadata["entries"]}

    @property
    def context_map(self) -> ContextMap:
        """The map T of a context_map edit, or of the first stage of a weight_delta, in float64."""
        if self.kind == "text_maps":
            raise ValueError("a text_maps edit has a map for each text entry: see edit.maps")
        if "left" not in self.tensors:
            raise ValueError(f"a {self.kind} edit is not one map of text embeddings")
        return ContextMap(self.tensors["left"].double(), self.tensors["right"].double())

    def first_stage(self) -> "Edit":
        """The map of an edit of two stages, as an edit of its own. ValueError where there is none."""
        self.context_map  # noqa: B018
        return Edit("context_map", {name: self.tensors[name] for name in ("left", "right")}, self.metadata)

    @property
    def digest(self) -> str:
        """SHA-256 of kind, base and tensors, and a filter's settings: equal for edits that do the same to the same
        model.
        """
        digest = hashlib.sha256(f"{self.kind} {self.metadata['base']}\n".encode())
        if self.kind in filters.KINDS:
            digest.update(json.dumps(self.metadata["filter"], sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy() if tensor.numel() else b"")
        return digest.hexdigest()

    def summary(self) -> str:
        """One line: method, what is erased, kind, rank or number of tensors, size, base."""
        erased = ", ".join(self.metadata.get("concepts", {}).get("erase", [])) or "nothing named"
        extent = []
        if "left" in self.tensors:
            extent.append(f"rank {self.tensors['left'].shape[1]} of {self.tensors['left'].shape[0]}")
        if self.kind == "text_maps":
            extent += [
                f"rank {one.rank} of {one.d} at {name.partition('.')[2]}" for name, one in self.maps.items()
            ]
        if self.kind in filters.KINDS:
            extent.append(filters.said(self.metadata["filter"]))
        if deltas := len(self._deltas):
            extent.append(f"{deltas} tensors")
        return (
            f"{self.metadata.get('method', 'unknown')}: erases {erased}; {self.kind}, {' and '.join(extent)}, "
            f"{self.nbytes / 1000:.1f} kB; base {self.metadata['base'][:12]}"
        )

    @contextmanager
    def applied(self, model: DiffusionModel, scale: float = 1.0) -> Iterator[DiffusionModel]:
        """Apply inside a `with` block; on exit the very same original tensors are back, also after an
        exception, and no hook of a filter is left. Every weight is read back after it was written.

        scale: strength, 1 as fitted, 0 nothing. Blocks may be nested: the inner edit acts on the weights that
        the outer one left; a filter acts on what they give, whichever is outside. ValueError, with nothing changed,
        when the model is not the one the edit was made for, where its weights are not those it computes with
        (`DiffusionModel.check_editable`), for a scale that is not finite, and for a filter of a compiled part; at the
        end of the block, with the weights put back, when projections or a LoRA were fused or a filter's part was
        compiled inside it, and when it is left before a block inside it, whose weights are then put back as well.
        """
        self._check_base(model)
        new = self._edited(model, scale)
        own = self, scale, [(parameter, parameter.data) for parameter, _ in new]
        active, loras = model._active, getattr(model.pipeline, "num_fused_loras", 0)
        with self._filter(model, scale):
            active.append(own)
            try:
                _write_values(new)
                yield model
            finally:
                # first, since it is subtracted from the edited weights to which it was added
                parts = [getattr(model.pipeline, part, None) for part in models.PARTS]
                fused = [unmerge(uncompiled(part)) for part in parts if part is not None]
                in_turn = _undo(active, own)
        check_unfused(model.denoiser)  # what was fused inside the block keeps the edit
        if any(fused) or getattr(model.pipeline, "num_fused_loras", 0) > loras:
            raise ValueError(
                "a LoRA was fused inside the block, and the weights that the edit changes are back without it: load "
                "the pipeline again, and fuse before the block or into what `merged` returns"
            )
        if not in_turn:
            raise ValueError(
                "a block of an edit was left before a block inside it, so the edits of both are undone now: leave the "
                "inner block first"
            )

    def merged(self, model: DiffusionModel, scale: float = 1.0, *, shared: bool = False) -> DiffusionModel:
        """A new model with the edit folded into its weights; `model` is left alone. ValueError for a filter.

        shared: what the edit leaves lies in the memory of `model`, as in its `copy`.
        """
        self._check_weights("merged")
        self._check_base(model)
        merged = model.copy(shared=shared)
        _write_values(self._edited(merged, scale))
        return merged

    def compose(self, other: "Edit") -> "Edit":
        """Both edits as one: first this one, then `other`, as in nested `applied` blocks.

        Context maps multiply, W' = (W T_self) T_other; deltas add. ValueError for different bases or kinds.
        """
        self._check_weights("compose")
        other._check_weights("compose")
        of = "text_base" if self.kind == other.kind == "text_encoder" else "base"
        if self.metadata[of] != other.metadata[of]:
            raise ValueError(
                "the edits were made for different models: "
                f"{self.metadata['base']} and {other.metadata['base']}"
            )
        if self.kind != other.kind:
            raise ValueError(
                f"cannot compose a {self.kind} with a {other.kind}: nest their applied(model) blocks instead"
            )
        if self.kind != "context_map" and any("left" in one.tensors for one in (self, other)):
            raise ValueError("edits of two stages do not compose: nest their applied(model) blocks instead")
        if self.kind == "text_maps":
            return self._composed_maps(other)
        if self.kind == "context_map":
            both = self.context_map.compose(other.context_map).compressed(rtol=1e-7)
            tensors = {"left": both.left.float(), "right": both.right.float()}
        else:
            tensors = dict(self.tensors)
            for name, tensor in other.tensors.items():
                tensors[name] = tensors[name] + tensor if name in tensors else tensor
        return Edit(self.kind, tensors, self._composed_metadata(other))

    def rebased(self, model: DiffusionModel) -> "Edit":
        """The same change for another model with the same text encoders: one that was fine-tuned or merged.

        A map of text embeddings is what `fit` would give there where the method looks at text alone (UCE, MACE's
        refinement, TRCE's first stage); RECE's rounds have looked at the weights of the old base. A delta is added as
        it is, "by difference" as merging tools call it, which is not what training there would give: measure it. An
        edit of the text encoder fits already. ValueError for another text encoder, for parameters that are not there,
        and for a text_maps edit, which may read several encoders.
        """
        self._check_weights("rebased")
        model.check_fit()
        if self.kind == "text_maps":
            raise ValueError("a text_maps edit belongs to the model that it was fitted for: fit again")
        known, found = self.metadata["text_base"], model.text_fingerprint()
        if known == found and self.kind != "text_encoder":  # of which the first alone is known to be the same
            known, found = self.metadata.get("text_bases", known), model.texts_fingerprint()
        if found != known:
            raise ValueError(
                f"this edit was made with the text encoder {known}, the model has {found} (of several, all count): "
                "what it maps means something else there, so fit again"
            )
        for name, delta in self._deltas.items():
            if (shape := _parameter(model, name).shape) != delta.shape:
                raise ValueError(
                    f"{name} has shape {tuple(shape)} there, its delta {tuple(delta.shape)}: fit again"
                )
        moved = {"base": model.fingerprint(), "source": model.source}
        rebased = Edit(self.kind, self.tensors, {**self.metadata, **moved})
        rebased._edited(model, 1.0)
        return rebased

    def _composed_maps(self, other: "Edit") -> "Edit":
        tensors = {**self.tensors, **other.tensors}
        for name in self.maps.keys() & other.maps.keys():
            both = self.maps[name].compose(other.maps[name]).compressed(rtol=1e-7)
            tensors |= {f"{name}.left": both.left.float(), f"{name}.right": both.right.float()}
        entries = {**self.metadata["entries"], **other.metadata["entries"]}
        return Edit("text_maps", tensors, {**self._composed_metadata(other), "entries": entries})

    def _composed_metadata(self, other: "Edit") -> dict:
        parts = [self.metadata, other.metadata]
        return {
            **self.metadata,
            "method": " + ".join(part.get("method", "unknown") for part in parts),
            "config": [part.get("config") for part in parts],
            "concepts": {
                key: sum((part.get("concepts", {}).get(key, []) for part in parts), [])
                for key in ("erase", "anchor", "preserve")
            },
        }

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        header = {"format": FORMAT, "kind": self.kind, "digest": self.digest, "metadata": self.metadata}
        _write(Path(path), self.tensors, {"erasekit": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> "Edit":
        """Read what `save` wrote. FileNotFoundError, or ValueError for a file that is damaged or not an
        edit."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no edit at {path}")
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("erasekit", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is truncated or not a safetensors file ({error}): save it again"
            ) from error
        known = (
            isinstance(header, dict)
            and header.get("format") == FORMAT
            and {"kind", "digest"} <= header.keys()
        )
        metadata = header.get("metadata") if known else None
        if not isinstance(metadata, dict) or not {"base", "text_base"} <= metadata.keys():
            raise ValueError(
                f"{path} is not an edit of this version of erasekit: expected a file that Edit.save wrote"
            )
        edit = cls(header["kind"], tensors, metadata)
        if edit.digest != header["digest"]:
            raise ValueError(f"{path} is damaged: its tensors are not the ones that were saved")
        return edit

    def to_lora(
        self, folder: str | Path, *, model: DiffusionModel | None = None, error: float = 1e-7
    ) -> Path:
        """Write `pytorch_lora_weights.safetensors`, which stock `pipeline.load_lora_weights(folder)` reads.

        A context map is a LoRA exactly: W T - W = (W left) right^T. A delta is factored: of each layer's change a share
        of at most `error` (Frobenius norm) is left out, by default what single precision does not hold. Changed biases
        go along as `lora_B.bias` (diffusers 0.30 does not read it, 0.35 does). Needs the base weights: `model`, or a
        model in memory with the same fingerprint, or the edit's source, loaded again. Raises ValueError when none is
        at hand, for a delta of something other than a Linear of the denoiser, and for a pipeline that reads no LoRA
        (PixArt).
        """
        self._check_weights("to_lora")
        model = self._base(model)
        if not hasattr(model.pipeline, "load_lora_weights"):
            raise ValueError(
                f"{type(model.pipeline).__name__} reads no LoRA: use `merged` and save the model"
            )
        factors, biases = self._factors(model, error)
        tensors = {}
        for stem, (b, a) in factors.items():
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a, b
            if biases:  # all layers or none have one in PEFT
                tensors[f"{stem}.lora_B.bias"] = biases.get(stem, torch.zeros(len(b)))
        path = Path(folder) / "pytorch_lora_weights.safetensors"
        _write(path, tensors, {"format": "pt"})
        return path

    def to_kohya(self, path: str | Path, *, model: DiffusionModel | None = None, error: float = 1e-7) -> Path:
        """Write the LoRA of `to_lora` under the names of kohya's trainers, as one file for web interfaces.

        path: ends in .safetensors. Layers have their names in diffusers, those of SDXL their original names, as kohya
        trains them: lora_unet_….lora_down.weight (rank, d_in), .lora_up.weight (d_out, rank) and .alpha, the rank.
        Stock `pipeline.load_lora_weights(path)` reads it as well. The metadata name the base version where the width of
        the text embeddings tells it. ValueError for what `to_lora` refuses, for changed biases, and for other
        denoisers than the UNets of Stable Diffusion 1, 2 and XL.
        """
        self._check_weights("to_kohya")
        model, path = self._base(model), named_safetensors(path)
        factors, biases = self._factors(model, error)
        if biases:
            raise ValueError(
                f"kohya's LoRA has no place for the changed bias of {next(iter(biases))}: use to_lycoris, or to_lora"
            )
        tensors = {}
        for stem, (b, a) in factors.items():
            name, rank = _kohya_name(model, stem), len(a)
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = a, b
            tensors[f"{name}.alpha"] = torch.tensor(float(rank))
        said = {"ss_network_module": "networks.lora", **checkpoints.kohya_version(model.denoiser)}
        if factors:
            said |= {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
        _write(path, tensors, {"format": "pt", **said})
        return path

    def to_lycoris(self, path: str | Path, *, model: DiffusionModel | None = None) -> Path:
        """Write the whole change of each changed layer of the UNet, in the keys of LyCORIS' algorithm "full".

        path: ends in .safetensors; layers are named as in `to_kohya`. lora_unet_….diff has the shape of the weight of a
        Linear or a convolution, .diff_b that of the bias; .w_norm and .b_norm are those of a norm. For what no LoRA
        holds: convolutions, biases, full rank. LyCORIS and web interfaces read it, stock diffusers does not. Base
        weights as in `to_lora`. ValueError for changes outside the UNet, and for other denoisers as in `to_kohya`.
        """
        self._check_weights("to_lycoris")
        model, path = self._base(model), named_safetensors(path)
        names = {id(one): name for name, one in model.denoiser.named_parameters()}
        tensors = {}
        for parameter, value in self._edited(model, 1.0):
            name = names.get(id(parameter))
            layer, _, kind = (name or "").rpartition(".")
            owner = model.denoiser.get_submodule(layer)
            if name is None or not isinstance(owner, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)):
                instead = "to_text_encoder, or " if self.kind == "text_encoder" else ""
                raise ValueError(
                    f"this {self.kind} changes {name or 'the text encoder'}, for which LyCORIS has no key here: use "
                    f"{instead}`merged` and save_single_file"
                )
            keys = ("diff", "diff_b") if isinstance(owner, (nn.Linear, nn.Conv2d)) else ("w_norm", "b_norm")
            stem = _kohya_name(model, layer)
            tensors.setdefault(f"{stem}.{keys[0]}", torch.zeros_like(owner.weight).float().cpu())
            key = f"{stem}.{keys[kind == 'bias']}"
            tensors[key] = (value.double() - parameter.double()).detach().float().cpu()
        said = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": "full"})}
        _write(path, tensors, {"format": "pt", **said, **checkpoints.kohya_version(model.denoiser)})
        return path

    def to_text_encoder(self, folder: str | Path, *, model: DiffusionModel | None = None) -> Path:
        """Write the edited text encoder as a folder that `CLIPTextModel.from_pretrained` reads, to be put into any
        pipeline that was made with the unedited one. Base weights as in `to_lora`. ValueError for another kind.
        """
        self._check_weights("to_text_encoder")
        if self.kind != "text_encoder":
            raise ValueError(
                f"a {self.kind} edit does not change the text encoder, or more than it: use `merged` and save the model"
            )
        edited = self.merged(self._base(model))
        with models.quietly():
            edited.text_encoder.save_pretrained(folder, safe_serialization=True)
        models.write_old_names(folder)
        return Path(folder)

    def to_projections(self, path: str | Path, *, model: DiffusionModel | None = None) -> Path:
        """Write the edited key and value weights themselves, {"….attn2.to_k.weight": (d_out, d)}, one safetensors file.

        What users of UCE and RECE pass around: `unet.load_state_dict(load_file(path), strict=False)`. Base weights as
        in `to_lora`. ValueError for an edit of other weights.
        """
        self._check_weights("to_projections")
        edited = self.projections(model)
        _write(Path(path), {name: value.cpu() for name, value in edited.items()}, {"format": "pt"})
        return Path(path)

    def projections(self, model: DiffusionModel | None = None) -> dict[str, Tensor]:
        """The edited key and value weights of a model, {"….attn2.to_k.weight": (d_out, d)}; the model is left alone.
        ValueError for an edit of other weights.
        """
        self._check_weights("projections")
        if self.kind == "text_maps":
            raise ValueError(
                "a text_maps edit changes more than key and value projections: use edit.merged(model).save_pretrained"
                "(folder), or to_lora"
            )
        model = self._base(model)
        names = {id(layer.weight): name for name, layer in cross_attention_kv(model.unet).items()}
        edited = self._edited(model, 1.0)
        if not all(id(parameter) in names for parameter, _ in edited):
            raise ValueError(f"this {self.kind} edit changes more than key and value projections: use merged")
        return {names[id(parameter)]: value for parameter, value in edited}

    def _factors(
        self, model: DiffusionModel, error: float
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """The LoRA of this edit: {"unet.LAYER": (B, A)}, (d_out, r) and (r, d_in), with W' = W + B A, and
        {"unet.LAYER": change of the bias}; float32 on the CPU. One rank r for all (zero-padded), so that with alpha = r
        the loader's scale is 1 everywhere. A layer of which the bias alone changes has factors of zeros.
        """
        if not 0 <= error < 1:
            raise ValueError(f"error is a share of the change, from 0 to below 1, got {error}")
        factors, biases = {}, {}
        if "left" in self.tensors:
            t = self.context_map
            for name, layer in cross_attention_kv(model.unet).items():
                left, right = layer.weight.double() @ t.left.to(layer.weight.device), t.right.T
                factors[f"unet.{name.removesuffix('.weight')}"] = left, right
        for name, one in self.maps.items() if self.kind == "text_maps" else ():
            start, stop = self.metadata["entries"][name]["columns"]
            for weight in self.metadata["entries"][name]["weights"]:
                w = _parameter(model, weight).detach()
                left = w[:, start:stop].double() @ one.left.to(w.device)
                right = nn.functional.pad(one.right.T, (start, w.shape[1] - stop))
                factors[weight.removesuffix(".weight")] = left, right
        for name, delta in self._deltas.items():
            stem, _, kind = name.rpartition(".")
            part, *path = stem.split(".")
            owner = uncompiled(model.pipeline.components[part]).get_submodule(".".join(path))
            if part not in ("unet", "transformer") or type(owner) is not nn.Linear:
                raise ValueError(
                    f"{name} cannot become a LoRA: only weights of the denoiser's Linear layers can. Use `merged` "
                    "and save the model, or train parameters that can (ESD: parameters='x-strict' or 'x')"
                )
            if kind == "bias":
                biases[stem] = delta
                continue
            if stem in factors:  # by the first stage
                b, a = factors[stem]
                delta = delta.to(b) + b @ a
            factors[stem] = _factored(delta, error)
        for stem in [one for one in biases if one not in factors]:
            owner = model.denoiser.get_submodule(stem.partition(".")[2])
            factors[stem] = torch.zeros(owner.out_features, 0), torch.zeros(0, owner.in_features)
        rank = max([1, *(a.shape[0] for _, a in factors.values())])
        for stem, (b, a) in factors.items():
            pad = rank - a.shape[0]
            b, a = nn.functional.pad(b, (0, pad)), nn.functional.pad(a, (0, 0, 0, pad))
            factors[stem] = b.detach().float().cpu(), a.detach().float().cpu()
        return factors, {stem: bias.float() for stem, bias in biases.items()}

    @property
    def _deltas(self) -> dict[str, Tensor]:
        if self.kind in ("text_maps", *filters.KINDS):
            return {}
        return {name: tensor for name, tensor in self.tensors.items() if name not in ("left", "right")}

    def _check_weights(self, export: str) -> None:
        if self.kind in filters.KINDS:
            raise ValueError(
                f"{export} needs an edit of weights, not the kind {self.kind}: {models.NO_WEIGHT}"
            )

    def _filter(self, model: DiffusionModel, scale: float) -> AbstractContextManager:
        if self.kind not in filters.KINDS:
            return nullcontext()
        tensors = {name: tensor.to(model.device) for name, tensor in self.tensors.items()}
        one = filters.Filter(tensors, self.metadata["filter"], scale)
        return filters.installed(self.kind, one, model.pipeline)

    def _base(self, model: DiffusionModel | None) -> DiffusionModel:
        if model is None:
            model = models.find(self.metadata["base"])
        source = self.metadata.get("source")
        if model is None and source:
            with suppress(FileNotFoundError):
                model = models.load(source)
        if model is None:
            raise ValueError(
                f"the model this edit was made for ({self.metadata['base']}) is not loaded"
                f"{f' and not at {source} any more' if source else ''}: pass model="
            )
        self._check_base(model)
        model.check_unedited()
        return model

    def _check_base(self, model: DiffusionModel) -> None:
        model.check_editable()
        if self.kind in filters.KINDS and not model.own_loop:
            raise ValueError(
                f"a {self.kind} is for Stable Diffusion 1 and 2; {type(model.pipeline).__name__} reads text elsewhere "
                "as well, which it would not filter"
            )
        if self.kind in ("text_encoder", "prompt_filter", "guidance_filter"):
            if (found := model.text_fingerprint()) != self.metadata["text_base"]:
                raise ValueError(
                    f"this edit was made for the text encoder {self.metadata['text_base']}, not for {found}: "
                    "it fits only models with that very text encoder"
                )
        elif (found := model.fingerprint()) != self.metadata["base"]:
            advice = (
                f"load the right one ({self.metadata.get('source') or 'a pipeline object'}), fit again, or for a model "
                "that was fine-tuned or merged take edit.rebased(model)"
            )
            if torch.bfloat16 in (model.dtype, model.text_encoder.dtype) and model.source is None:
                advice = (
                    "a pipeline in bfloat16 has lost digits that the fingerprint is of, so read its folder with "
                    "ek.load(folder, dtype='bfloat16'), or fit again"
                )
            raise ValueError(
                f"this edit was made for the model {self.metadata['base']}, not for {found}: {advice}"
            )

    def _edited(self, model: DiffusionModel, scale: float) -> list[tuple[nn.Parameter, Tensor]]:
        """Every changed parameter with its new value; nothing is written yet."""
        if not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale}")
        parameters, new = {}, {}
        if "left" in self.tensors:
            t = self.context_map.scaled(scale)
            parameters = {f"unet.{name}": one.weight for name, one in cross_attention_kv(model.unet).items()}
            if (width := next(iter(parameters.values())).shape[1]) != t.d:
                raise ValueError(f"the edit maps embeddings of width {t.d}, the model's are {width} wide")
            new = {name: t.apply_to_weight(weight.data) for name, weight in parameters.items()}
        if self.kind == "text_maps":
            for name, one in self.maps.items():
                start, stop = self.metadata["entries"][name]["columns"]
                for weight in self.metadata["entries"][name]["weights"]:
                    parameters[weight] = _parameter(model, weight)
                    new[weight] = parameters[weight].data.clone()
                    new[weight][:, start:stop] = one.scaled(scale).apply_to_weight(new[weight][:, start:stop])
        for name, delta in self._deltas.items():
            w = parameters[name] = _parameter(model, name)
            before = new.get(name, w.data)
            new[name] = (before.double() + scale * delta.to(w.device, torch.float64)).to(w.dtype)
        for name, value in new.items():
            if not value.isfinite().all():
                raise ValueError(
                    f"the edit makes {name} infinite or NaN in {value.dtype}: use a smaller scale"
                )
        return [(parameters[name], value) for name, value in new.items()]


def applied(
    edit: Edit | None, model: DiffusionModel, scale: float = 1.0
) -> AbstractContextManager[DiffusionModel]:
    """`Edit.applied`, for no edit as well."""
    return nullcontext(model) if edit is None else edit.applied(model, scale)


def _factored(delta: Tensor, error: float) -> tuple[Tensor, Tensor]:
    """B (d_out, r) and A (r, d) of the smallest r with ||delta - B A|| at most error ||delta||, Frobenius norms."""
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    left_out = s.square().flip(0).cumsum(0).flip(0).sqrt()  # from each singular value on
    keep = left_out > error * left_out[0]
    return u[:, keep] * s[keep], vh[keep]


def _kohya_name(model: DiffusionModel, stem: str) -> str:
    """Of "unet.LAYER". ValueError where there is no UNet."""
    if model.denoiser_part != "unet":
        raise ValueError(
            "kohya's names are known here for the UNets of Stable Diffusion 1, 2 and XL, not for a "
            f"{type(model.denoiser).__name__}: use to_lora, or `merged` and save the model"
        )
    return checkpoints.kohya_name(model.unet, stem.removeprefix("unet."))


def _write_values(new: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Give each parameter its value and read it back: some tensor classes take an assignment and keep what they had."""
    for parameter, value in new:
        parameter.data = value
        if not torch.equal(parameter.data, value):
            raise ValueError(
                f"a weight of shape {tuple(parameter.shape)} ({type(parameter).__name__}, {parameter.dtype}) did not "
                "take its new value: load the model unquantized, edit it, then quantize"
            )


def _undo(active: list, own: tuple) -> bool:
    """Put back the weights from before an edit in force, and first those from before the edits inside it; whether there
    were none. One that is no longer in force was undone so itself.
    """
    at = next((i for i, one in enumerate(active) if one is own), len(active))
    undone = active[at:]
    for _, _, old in reversed(undone):
        for parameter, value in old:
            # .to() is the tensor itself unless the model was moved inside the block
            parameter.data = value.to(parameter.device, parameter.dtype)
    del active[at:]
    return len(undone) <= 1


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy: the caller may go on with the memory of its own."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _parameter(model: DiffusionModel, name: str) -> nn.Parameter:
    part, _, rest = name.partition(".")
    try:
        return uncompiled(model.pipeline.components[part]).get_parameter(rest)
    except (KeyError, AttributeError) as error:
        raise ValueError(
            f"the model has no parameter {name!r}; expected a name like unet.conv_in.weight"
        ) from error


def _metadata(model: DiffusionModel, metadata: dict) -> dict:
    packages = {"torch": torch, "diffusers": diffusers, "transformers": transformers}
    whole = {
        **metadata,
        "base": model.fingerprint(),
        "text_base": model.text_fingerprint(),
        "source": model.source,
        "versions": {"erasekit": __version__}
        | {name: str(one.__version__) for name, one in packages.items()},
        "license": "that of the base model",
    }
    if (texts := model.texts_fingerprint()) != whole["text_base"]:
        whole["text_bases"] = texts
    if "config" in whole and not isinstance(whole["config"], dict):
        whole["config"] = asdict(whole["config"])
    return json.loads(json.dumps(whole))  # what a file would give back: lists for tuples


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
