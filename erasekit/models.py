"""DiffusionModel: a stock diffusers pipeline with deterministic pictures, prompt checks, a fingerprint."""

import copy
import hashlib
import inspect
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from operator import index
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from erasekit import checkpoints, filters, pipelines, worlds
from erasekit.concepts import Concept, as_concepts, token_ids
from erasekit.conditioning import Conditioning, joined, told
from erasekit.layers import FLOATS, check_editable, drop_unfused, sharing, text_projected_once, uncompiled
from erasekit.paths import named_safetensors, replacing, write_atomically
from erasekit.sampling import denoise

FIXED_BATCH = 4  # see DiffusionModel.fixed_batch
# What edits may change, and `fingerprint` is of
PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "unet", "transformer")
NO_WEIGHT = (
    "a filter acts when pictures are drawn and is in no weight, so draw inside `with edit.applied(model):`, nest the "
    "blocks of several edits, and keep it with edit.save"
)
NOTE = "erasekit.json"  # beside model_index.json: which world a saved model belongs to

# fingerprint -> a model in memory, so that an edit loaded from a file can find its base
_live: "weakref.WeakValueDictionary[str, DiffusionModel]" = weakref.WeakValueDictionary()
# pipeline -> the preset of the model around it
_presets: "weakref.WeakKeyDictionary[DiffusionPipeline, str]" = weakref.WeakKeyDictionary()
# denoiser -> its edits in force, the innermost last: (edit, scale, [(parameter, what it was)])
_in_force: "weakref.WeakKeyDictionary[torch.nn.Module, list]" = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class DiffusionModel:
    """A text-to-image model. Make one with `load`.

    preset: "sd", or the closed world it belongs to ("emoji"), which tells a method what its default settings are and
    which words there are. source: what it was loaded from.
    """

    pipeline: DiffusionPipeline = field(repr=False)
    preset: str = "sd"
    source: str | None = None
    # of the whole, of the first text encoder, of all text encoders
    _fingerprints: tuple[str, str, str] | None = field(default=None, init=False, repr=False)
    # digest in bfloat16 -> the fingerprints from before digits were lost, of the model that this is a copy of
    _finer: dict[str, tuple[str, str, str]] = field(default_factory=dict, init=False, repr=False)
    _text_entries: tuple | None = field(default=None, init=False, repr=False)  # of `text_entries`

    def __post_init__(self):
        if isinstance(self.pipeline, DiffusionPipeline):
            _presets[self.pipeline] = self.preset

    @property
    def _active(self) -> list:
        """What `_in_force` has of the denoiser: the same for every model around it."""
        return _in_force.setdefault(self.denoiser, [])

    @property
    def denoiser(self):
        """The UNet or the transformer that predicts noise or flow; of a compiled one the module that was compiled.
        ValueError for a pipeline with neither.
        """
        for name in ("unet", "transformer"):
            if (found := getattr(self.pipeline, name, None)) is not None:
                return uncompiled(found)
        raise ValueError(
            f"{type(self.pipeline).__name__} has neither a UNet nor a transformer: load a text-to-image pipeline"
        )

    @property
    def denoiser_part(self) -> str:
        """What the pipeline calls its denoiser: "unet" or "transformer"."""
        return "unet" if getattr(self.pipeline, "unet", None) is not None else "transformer"

    @property
    def unet(self):
        """The UNet; of a compiled one the module that was compiled. ValueError where there is none."""
        if getattr(self.pipeline, "unet", None) is None:
            raise ValueError(
                f"{type(self.pipeline).__name__} has no UNet but a {type(self.denoiser).__name__}, which this does not "
                "know: use what works with model.denoiser"
            )
        return uncompiled(self.pipeline.unet)

    @property
    def text_encoder(self):
        """The first text encoder; the second of a pipeline that has that alone, as SDXL's refiner."""
        first = self.pipeline.text_encoder
        return uncompiled(self.pipeline.text_encoder_2 if first is None else first)

    @property
    def tokenizer(self):
        first = self.pipeline.tokenizer
        return self.pipeline.tokenizer_2 if first is None else first

    @property
    def vae(self):
        return self.pipeline.vae

    @property
    def scheduler(self):
        return self.pipeline.scheduler

    @property
    def steps(self) -> int:
        """Steps of a picture where the caller does not say: as many as a closed world's sampler needs, else 25."""
        return worlds.STEPS.get(self.preset, 25)

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def own_loop(self) -> bool:
        """Whether `generate` draws by `sampling.walk`, as of Stable Diffusion 1 and 2, or by the pipeline's call."""
        return self.denoiser_part == "unet" and getattr(self.pipeline, "text_encoder_2", None) is None

    def check_drawn(self) -> None:
        """ValueError where `sampling.walk` does not draw the model: it knows Stable Diffusion 1, 2 and XL."""
        if not (self.own_loop or type(self.pipeline).__name__ == "StableDiffusionXLPipeline"):
            raise ValueError(
                "Stable Diffusion 1, 2 and XL are drawn from noise in a loop of our own, on which training, attacks "
                f"and runs depend, and {type(self.pipeline).__name__} is drawn by its pipeline: of SDXL give the base "
                "model as a StableDiffusionXLPipeline; else draw with model.generate, and erase by a closed form or by "
                "esd"
            )

    @property
    def fixed_batch(self) -> int | None:
        """4 for a small model (latents up to 16 x 16) on the CPU, else None.

        On a CPU a matrix product rounds alike wherever a row stands, but not at every batch size or number of
        threads. So a small model always computes four at a time, the last batch padded, by one thread (and as
        many batches at once as there are threads): pictures are then equal bit by bit, whatever batch they are
        in, and sixteen take less time, not more. Large models would pay the full fourfold.
        """
        return FIXED_BATCH if self._small and self.device.type == "cpu" else None

    @property
    def batch_size(self) -> int:
        """Latents computed at once where the caller does not say: `fixed_batch`, else 64 of a small model, whose time
        on an accelerator goes into starting its kernels, and 16 of a large one.
        """
        return self.fixed_batch or (64 if self._small else 16)

    @property
    def _small(self) -> bool:
        return self.denoiser_part == "unet" and max(self.latent_size) <= 16

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents of the model's own pictures. ValueError where its config does not say."""
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError(
                "this UNet's config has no sample_size: set unet.register_to_config(sample_size=64) or what it was "
                "trained with"
            )
        return (size, size) if isinstance(size, int) else tuple(size)

    def _latents(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Size of the latents of pictures of that many pixels, the model's own where None."""
        factor = self.pipeline.vae_scale_factor
        coarse = factor * 2 ** (
            len(self.unet.config.block_out_channels) - 1
        )  # one pixel of the coarsest block
        found = []
        for name, pixels, own in zip(("height", "width"), (height, width), self.latent_size, strict=True):
            whole = isinstance(pixels, int) and not isinstance(pixels, bool)
            if pixels is not None and (not whole or pixels < coarse or pixels % coarse):
                raise ValueError(f"{name} must be a positive multiple of {coarse} pixels, got {pixels!r}")
            found.append(own if pixels is None else pixels // factor)
        return found[0], found[1]

    @property
    def vocabulary(self) -> Mapping[str, tuple[Concept, ...]] | None:
        """{phrase: the concepts it stands for} in a closed world, None where any phrase may do."""
        return worlds.vocabulary(self.preset)

    @property
    def everything(self) -> tuple[Concept, ...]:
        """All concepts of a closed world, none where any phrase may do."""
        return worlds.concepts(self.preset)

    def concepts(self, given: str | Concept | Sequence[str | Concept]) -> tuple[Concept, ...]:
        """`given` as Concepts; in a closed world text is a known name, synonym, style or set, such as "weapon"."""
        return as_concepts(given, self.vocabulary)

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str], batch_size: int = 32, length: int | None = None) -> Tensor:
        """Text embeddings (n, length, d): the last hidden state, padded to the limit, no attention mask.

        With two text encoders, as in SDXL, what cross-attention reads there: the hidden states before the last
        layer of both, side by side. `encode("")` is the unconditional embedding (the SDXL pipeline may take zeros
        instead). Where the denoiser is a transformer, the embeddings that the pipeline's `encode_prompt` gives (see
        `pipelines.embeddings`). length: only the first so many rows, which do not depend on those that follow (CLIP's
        encoder is causal). Raises ValueError for a prompt over the token limit.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.denoiser_part == "transformer" and prompts:
            return pipelines.embeddings(self.pipeline, prompts, self.device)[:, :length].to(self.dtype)
        return self._conditioning(prompts, batch_size, length).rows

    def conditioning(self, prompts: str | Sequence[str]) -> Conditioning:
        """What the UNet is told of n prompts: their embeddings, as `encode` gives them, and of SDXL the pooled text.
        ValueError as in `check_drawn` and `encode`.
        """
        self.check_drawn()
        return self._conditioning([prompts] if isinstance(prompts, str) else list(prompts))

    def unconditional(self) -> Conditioning:
        """What guidance leads away from, for one picture: the empty prompt, or the zeros that SDXL's pipeline takes in
        its place (`force_zeros_for_empty_prompt`).
        """
        empty = self.conditioning("")
        zeros = self.pipeline.config.get("force_zeros_for_empty_prompt", False)
        return empty.each(torch.zeros_like) if zeros else empty

    @property
    def text_encoders(self) -> dict[str, torch.nn.Module]:
        """{part of the pipeline: CLIP text encoder} of those that a UNet is told a prompt by, in their order."""
        found = {name: getattr(self.pipeline, name, None) for name in ("text_encoder", "text_encoder_2")}
        return {name: uncompiled(one) for name, one in found.items() if one is not None}

    @property
    def tokenizers(self) -> list:
        """That of each of `text_encoders`."""
        return [
            getattr(self.pipeline, name.replace("text_encoder", "tokenizer")) for name in self.text_encoders
        ]

    def tokenized(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids (n, length) for each of `text_encoders`. ValueError for a prompt over the token limit."""
        return [token_ids(one, prompts).to(self.device) for one in self.tokenizers]

    @torch.no_grad()
    def _conditioning(
        self, prompts: Sequence[str], batch_size: int = 32, length: int | None = None
    ) -> Conditioning:
        if not prompts:
            raise ValueError("there is no prompt to encode: give at least one")
        fixed, encoders = self.fixed_batch, list(self.text_encoders.values())
        ids = [one[:, :length].split(fixed or batch_size) for one in self.tokenized(prompts)]

        @torch.no_grad()
        def batch(parts: tuple[Tensor, ...]) -> Conditioning:
            given = [_padded(one, fixed) for one in parts]
            return told(encoders, given, self.pipeline.vae_scale_factor)[: len(parts[0])]

        whole = joined(self._map(batch, list(zip(*ids, strict=True))))
        return whole.each(lambda one: one.to(self.dtype))

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int] = (0,),
        steps: int | None = None,
        guidance: float | None = None,
        negative: str | None = None,
        batch_size: int | None = None,
        callback: Callable[[dict], None] | None = None,
        progress: bool = False,
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Image]:
        """One picture per (prompt, seed) pair.

        `prompts` and `seeds` are zipped; whichever has one element is repeated, so
        `generate(["a cat"], seeds=range(5))` gives five pictures and `generate(prompts)` uses seed 0 for all.

        Every picture has its own generator on the CPU, so its noise depends on its seed alone, not on batch
        size, order or device. A small model on the CPU gives the same bits in any batch (`fixed_batch`, in
        place of batch_size); otherwise another batch size rounds differently, which can move a pixel by one
        of 256 levels.

        steps, batch_size: the model's own when None. guidance: 3 when None. negative: what guidance steers away from,
        the empty prompt by default. height, width: in pixels, the model's own size by default. callback: see
        `sampling.walk`; the dict also has `first`, the index of the first picture of the batch. Raises ValueError for
        an empty or over-long prompt, for lengths that do not match and for a size that the model cannot draw.

        SDXL and every family with a transformer are drawn by their pipeline (`pipelines.pictures`), one picture at a
        time unless batch_size says more, with its own guidance when None (`pipelines.guided`); prompts that its text
        encoders cut off are said in its log.
        """
        prompts, seeds = self._pairs(prompts, seeds)
        if not isinstance(negative, str | None):
            raise ValueError(f"negative must be one text for all pictures, got {negative!r}")
        steps = self.steps if steps is None else steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
        batch_size = (self.batch_size if self.own_loop else 1) if batch_size is None else batch_size
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if not self.own_loop:
            with tqdm(total=len(prompts), disable=not progress, unit="picture") as bar:
                drawn = []
                for first in range(0, len(prompts), batch_size):
                    part = slice(first, first + batch_size)
                    drawn += pipelines.pictures(
                        self.pipeline,
                        prompts[part],
                        seeds[part],
                        first=first,
                        callback=callback,
                        height=height,
                        width=width,
                        num_inference_steps=steps,
                        **pipelines.guided(self.pipeline, self.denoiser, guidance, negative),
                    )
                    bar.update(len(prompts[part]))
            return drawn

        distinct = list(dict.fromkeys(prompts))
        row = {prompt: i for i, prompt in enumerate(distinct)}
        embeddings = self.encode(distinct)[[row[prompt] for prompt in prompts]]
        return self.draw(
            embeddings,
            seeds,
            steps=steps,
            guidance=3.0 if guidance is None else guidance,
            uncond=self.encode(negative or "")[0],
            batch_size=batch_size,
            callback=callback,
            progress=progress,
            height=height,
            width=width,
        )

    @torch.no_grad()
    def draw(
        self,
        embeddings: Tensor | Conditioning,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float = 3.0,
        uncond: Tensor | Conditioning | None = None,
        batch_size: int | None = None,
        callback: Callable[[dict], None] | None = None,
        progress: bool = False,
        height: int | None = None,
        width: int | None = None,
        skip: int = 0,
        stop: int | None = None,
        start: Tensor | None = None,
        decode: bool = True,
    ) -> list[Image] | Tensor:
        """One picture per text embedding (n, length, d) and seed (n); what `generate` does after encoding.

        Attacks in embedding space start here. SDXL needs a `Conditioning`, whose pooled text is drawn with. uncond:
        (length, d) or the conditioning of one prompt, `unconditional` when None. skip, stop, start: a part of the way,
        see `sampling.walk`. decode: False for the latents (n, channels, height, width) instead of pictures. ValueError
        for a family that its own pipeline draws, and for a part of the way that has no steps.
        """
        self.check_drawn()
        embeddings = Conditioning(embeddings) if isinstance(embeddings, Tensor) else embeddings
        uncond = self.unconditional() if uncond is None else uncond
        steps = self.steps if steps is None else steps
        uncond = Conditioning(uncond[None]) if isinstance(uncond, Tensor) else uncond
        if embeddings.rows.ndim != 3 or len(embeddings) != len(seeds):
            shape = tuple(embeddings.rows.shape)
            raise ValueError(f"expected embeddings (n, length, d) and n seeds, got {shape} and {len(seeds)}")
        if any((one.pooled is None) != self.own_loop for one in (embeddings, uncond)):
            raise ValueError(
                "SDXL is drawn from embeddings with the pooled text beside them: give what model.conditioning(prompts) "
                "returns, its rows changed or not; other models have no pooled text"
            )
        if not 0 <= skip < (steps if stop is None else stop) <= steps:
            raise ValueError(f"of {steps} steps none is from {skip} to before {stop}: skip < stop is needed")
        if start is not None and len(start) != len(seeds):
            raise ValueError(f"start has latents for {len(start)} pictures, and there are {len(seeds)} seeds")
        embeddings, seeds = embeddings.each(lambda one: one.to(self.device, self.dtype)), list(seeds)
        fixed, size = self.fixed_batch, self._latents(height, width)
        starts = range(0, len(embeddings), fixed or batch_size or self.batch_size)

        def batch(first: int) -> list[Image] | Tensor:
            part = slice(first, first + starts.step)
            count = len(embeddings[part])
            text = embeddings[part].each(lambda one: _padded(one, fixed))
            own = seeds[part] + seeds[part][-1:] * (len(text) - count)

            def report(state: dict) -> None:
                with tqdm.get_lock():
                    bar.update()
                if callback is not None:
                    cut = {k: v[:count] if isinstance(v, Tensor) else v for k, v in state.items()}
                    callback({**cut, "first": first})

            latents = denoise(
                self.unet,
                self.scheduler,
                text,
                uncond.times(len(text)),
                [torch.Generator().manual_seed(seed) for seed in own],
                steps=steps,
                guidance=guidance,
                size=size,
                callback=report,
                skip=skip,
                stop=stop,
                start=None if start is None else _padded(start[part], fixed),
            )
            return self.decode(latents)[:count] if decode else latents[:count]

        with (
            tqdm(total=len(starts) * steps, disable=not progress, unit="step") as bar,
            text_projected_once(self.unet),
        ):
            parts = self._map(batch, starts, callback is None)
        return [picture for part in parts for picture in part] if decode else torch.cat(parts)

    def _map(self, work: Callable, items: Iterable, parallel: bool = True) -> list:
        """work(item) for every item: on a small model one thread each, several items at a time, so that neither the
        results nor, by much, the time depend on how many threads share one matrix product.
        """
        threads = torch.get_num_threads()
        if self.fixed_batch is None:
            return [work(item) for item in items]
        torch.set_num_threads(1)
        try:
            if not parallel or threads == 1:
                return [work(item) for item in items]
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return list(pool.map(work, items))
        finally:
            torch.set_num_threads(threads)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image]:
        """Pictures of latents (n, channels, height, width); of SDXL by the mean and standard deviation of each channel
        where the VAE's config has them, as in its pipeline.
        """
        with self.steady_vae() as vae:
            latents, scale = latents.to(vae.dtype), vae.config.scaling_factor
            if (moments := self._moments(latents)) is None:
                latents = latents / scale
            else:
                latents = latents * moments[1] / scale + moments[0]
            pixels = vae.decode(latents).sample
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")

    def scaled(self, encoded: Tensor) -> Tensor:
        """Latents as the denoiser knows them of what the VAE encodes, (n, channels, height, width): the inverse of what
        `decode` does first.
        """
        scale = self.vae.config.scaling_factor
        if (moments := self._moments(encoded)) is None:
            return encoded * scale
        return (encoded - moments[0]) * scale / moments[1]

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of the latents' channels, which SDXL's pipeline takes where the VAE has them."""
        found = [self.vae.config.get(name) for name in ("latents_mean", "latents_std")]
        if self.own_loop or None in found:
            return None
        return tuple(like.new_tensor(one).view(1, -1, 1, 1) for one in found)

    @contextmanager
    def steady_vae(self) -> Iterator[AutoencoderKL]:
        """The VAE; inside the block that of SDXL, which overflows in half precision, computes in single precision."""
        upcast = not self.own_loop and self.vae.dtype is torch.float16 and self.vae.config.force_upcast
        try:
            yield self.vae.float() if upcast else self.vae
        finally:
            if upcast:
                self.vae.half()

    def fingerprint(self) -> str:
        """SHA-256 of the denoiser and text encoder weights as float16, of the model without any edit in force and
        without the tokens that textual inversions added.

        Rounding to float16 makes it the same for a model loaded in single and in half precision. Of one that `load`
        reads in bfloat16, which is coarser, and of its copies it is that of the files. Computed once: weights that are
        changed by other means than an Edit need a new `load(model.pipeline)`. ValueError while an edit of weights is in
        force that was applied to another model around the same denoiser, and this one's is not known yet.
        """
        if self._fingerprints is None:
            if any(edit.kind not in filters.KINDS for edit, *_ in self._active):
                raise ValueError(
                    "an edit is applied to this pipeline, and how it is without is not known here: use the model that "
                    "the edit was applied to, or leave its `with` block first"
                )
            found = self._digests(*PARTS)
            texts = [one for part, one in zip(PARTS, found, strict=True) if part.startswith("text_encoder")]
            self._fingerprints = self._finer.get(found[-1], (found[-1], texts[0], texts[-1]))
        _live[self._fingerprints[0]] = self
        return self._fingerprints[0]

    def text_fingerprint(self) -> str:
        """The same of the text encoder alone: models that share it can share an edit of it."""
        self.fingerprint()
        return self._fingerprints[1]

    def texts_fingerprint(self) -> str:
        """The same of all text encoders, as of SDXL; of a model with one it is `text_fingerprint`."""
        self.fingerprint()
        return self._fingerprints[2]

    def vae_fingerprint(self) -> str:
        """The same of the VAE, on which pictures depend and edits do not."""
        return self._digests("vae")[0]

    def _digests(self, *parts: str) -> list[str]:
        """Of the first part, of the first two, and so on; a part that is not there adds nothing."""
        digest, found = hashlib.sha256(), []
        for part in parts:
            if (module := uncompiled(getattr(self.pipeline, part, None))) is not None:
                drop_unfused(module)
            for name, tensor in sorted(module.state_dict().items()) if module is not None else ():
                if name.endswith("token_embedding.weight"):
                    tensor = tensor[: len(tensor) - self._added(part)]
                if tensor.is_floating_point():
                    digest.update(f"{part}.{name} {tuple(tensor.shape)}\n".encode())
                    digest.update(tensor.detach().half().cpu().contiguous().numpy())
            found.append(digest.hexdigest())
        return found

    def _added(self, part: str) -> int:
        """Rows at the end of the token table that textual inversions added, of which no edit needs to know."""
        tokenizer = getattr(self.pipeline, part.replace("text_encoder", "tokenizer"))
        return len(tokenizer) - tokenizer.vocab_size

    @property
    def _filtered(self) -> bool:
        """Whether a filter acts on the pipeline, applied to this model or to another one around the same parts."""
        return filters.in_force(*(getattr(self.pipeline, part, None) for part in PARTS))

    def edits_in_force(self) -> list[str]:
        """Digests of the applied edits, with the strength of those that are not applied whole. ValueError where a
        filter acts that was applied to a model around another denoiser, with which this one shares the text encoder:
        what is kept by these would be mistaken.
        """
        if self._filtered and not any(edit.kind in filters.KINDS for edit, *_ in self._active):
            raise ValueError(
                "a filter is in force on this pipeline: use the model that its edit was applied to, or leave its "
                "`with` block first"
            )
        return [
            edit.digest if scale == 1 else f"{edit.digest} x {scale!r}" for edit, scale, _ in self._active
        ]

    def check_editable(self) -> None:
        """ValueError, with what to do, where the weights are not those that the model computes with, and an edit would
        change nothing: see `layers.check_editable`.
        """
        for part in PARTS:
            if (module := uncompiled(getattr(self.pipeline, part, None))) is not None:
                check_editable(part, module)

    def check_fit(self) -> None:
        """The same, and that no edit is in force: what is fitted is kept with the fingerprint of the model without."""
        self.check_editable()
        if self._active or self._filtered:
            raise ValueError(
                "an edit is applied to this model: leave its `with` block to fit another, or fit the model that "
                "edit.merged(model) returns"
            )

    def check_unedited(self) -> None:
        """ValueError while an edit is in force."""
        if self._active or self._filtered:
            raise ValueError("an edit is applied to this model: leave its `with` block first")

    def copy(self, *, shared: bool = False) -> "DiffusionModel":
        """An independent model with the same weights. ValueError while an edit is in force, and for a pipeline that
        cannot be copied.

        shared: its weights lie in the memory of this model's, whose values must stay as they are; an edit of either
        makes new ones.
        """
        self.check_unedited()
        try:
            model = DiffusionModel(copied(self.pipeline, shared), self.preset)
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"the pipeline cannot be copied ({error}): load it without offloading and quantization, or use "
                "`applied`"
            ) from error
        model._finer = self._finer
        if self._fingerprints and self.dtype is torch.bfloat16:
            model._finer = {self._digests(*PARTS)[-1]: self._fingerprints}
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a stock diffusers folder, which `load` and `DiffusionPipeline.from_pretrained` both read. ValueError
        where it would not be read back as it is (`check_editable`); an edit in force is written with the weights,
        and a filter, which is in none, refused.
        """
        self._check_written()
        with quietly():
            self.pipeline.save_pretrained(folder, safe_serialization=True)
        tidy_configs(folder, "model_index.json")
        for name in [name for name, part in self.pipeline.components.items() if part is not None]:
            tidy_configs(Path(folder) / name)
            write_old_names(Path(folder) / name)
        write_atomically(Path(folder) / NOTE, json.dumps({"preset": self.preset}) + "\n")

    def save_single_file(self, path: str | Path) -> Path:
        """Write one safetensors file in the original layout of Stable Diffusion 1, 2 or XL, which web interfaces read,
        as does stock `StableDiffusionPipeline.from_single_file(path, config=folder)`, SDXL's likewise.

        It holds the weights of UNet, VAE and text encoders, in their dtypes, and an edit in force with them; not the
        scheduler, the tokenizers and the sizes, which a reader takes from the configs in `folder` (`save_pretrained`)
        or assumes. ValueError for another pipeline, where `check_editable` finds that the weights are not all, and
        while a filter is in force.
        """
        self._check_written()
        path = named_safetensors(path)
        tensors = {name: one.contiguous() for name, one in checkpoints.state_dict(self.pipeline).items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"format": "pt"})
        return path

    def _check_written(self) -> None:
        self.check_editable()
        if self._filtered:
            raise ValueError(f"a filter is in force, which cannot be saved with the model: {NO_WEIGHT}")
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                drop_unfused(part)

    def _pairs(self, prompts, seeds) -> tuple[list[str], list[int]]:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [seeds] if isinstance(seeds, Integral) else list(seeds)
        if not prompts or not seeds:
            raise ValueError("generate needs at least one prompt and one seed")
        for prompt in prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(
                    f"a prompt must be text that says something, got {prompt!r}; "
                    'for the unconditional embedding use encode("")'
                )
        if 1 not in (len(prompts), len(seeds)) and len(prompts) != len(seeds):
            raise ValueError(
                f"{len(prompts)} prompts and {len(seeds)} seeds: give as many of each, or one of either"
            )
        try:
            seeds = [index(seed) for seed in seeds]
        except TypeError as error:
            raise ValueError(f"seeds must be whole numbers, got {seeds!r}") from error
        count = max(len(prompts), len(seeds))
        return (
            prompts * count if len(prompts) == 1 else prompts,
            seeds * count if len(seeds) == 1 else seeds,
        )


def copied(pipeline: DiffusionPipeline, shared: bool = False) -> DiffusionPipeline:
    """A deep copy that shares the tokenizers: they do not change, and their decoder does not survive a deep copy.
    shared: the values of parameters as well.
    """
    modules = (
        [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)] if shared else []
    )
    result = copy.deepcopy(pipeline, sharing(one for module in modules for one in module.parameters()))
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            setattr(result, name, part)
    return result


def write_old_names(folder: str | Path) -> None:
    """Make the CLIP text encoder or tokenizer in a folder readable by transformers before 5 as well.

    Since 5.6 the weights of a `CLIPTextModel` are written without the prefix `text_model.`; 4.44 to 4.57 find none of
    them then, and draw all at random with no more than a warning. Both read the prefixed names. The older tokenizers
    want vocab.json and merges.txt beside tokenizer.json.
    """
    for config in Path(folder).glob("config.json"):
        weights = config.parent / "model.safetensors"
        if json.loads(config.read_text()).get("architectures") == ["CLIPTextModel"] and weights.is_file():
            prefixed = lambda name: name if name.startswith("text_model.") else f"text_model.{name}"
            tensors = {prefixed(name): tensor for name, tensor in load_file(weights).items()}
            with replacing(weights) as temporary:
                save_file(tensors, temporary, {"format": "pt"})
    for file in Path(folder).glob("tokenizer.json"):
        model = Tokenizer.from_file(str(file)).model
        if isinstance(model, BPE):
            model.save(str(file.parent))


def tidy_configs(folder: str | Path, names: str = "*.json") -> None:
    """Leave out of each config in a folder where it was read from, which means nothing elsewhere, and minus
    infinity, diffusers' default for `lambda_min_clipped`: it is no JSON, and readers other than Python's fail.
    """
    for file in Path(folder).glob(names):
        if not isinstance(config := json.loads(file.read_text()), dict):
            continue
        kept = {k: v for k, v in config.items() if k != "_name_or_path" and v != float("-inf")}
        if kept != config:
            write_atomically(file, json.dumps(kept, indent=2) + "\n")


def _padded(rows: Tensor, size: int | None) -> Tensor:
    """The last row repeated up to `size` rows; None leaves the rows alone."""
    return rows if size is None else torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])


def load(
    source: str | Path | DiffusionPipeline = "emoji",
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
) -> DiffusionModel:
    """A DiffusionModel from a world's name ("emoji"), a diffusers folder, a hub id, or a pipeline object (not copied).

    device "auto": the GPU where there is one (under `accelerate launch` or torchrun this process's own), else the
    CPU; a pipeline object stays where it is. dtype "auto": on a GPU float16, or bfloat16 where the denoiser is a
    transformer; float32 on the CPU and for the emoji model, which gains nothing from less; a pipeline object keeps its
    own, and the world of the model that it was taken from. A folder whose weights are all of the variant fp16 is read
    as it is. Raises FileNotFoundError for a missing and ValueError for a damaged model, for a single file, for a dtype
    that models are not drawn in, and for a folder that was saved with a LoRA in the UNet.
    """
    if dtype != "auto":
        given, dtype = dtype, getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype not in FLOATS:
            raise ValueError(
                f"unknown dtype {given!r}: use 'auto', 'float32', 'float16', 'bfloat16' or 'float64', and quantize "
                "the pipeline afterwards"
            )

    known = None
    if isinstance(source, DiffusionPipeline):
        pipeline, preset, name = source, _presets.get(source, "sd"), None
        if device != "auto":
            pipeline.to(device)
    else:
        if device == "auto":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            half = torch.device(device).type == "cuda" and source not in worlds.WORLDS
            dtype = _half_of(str(source)) if half else torch.float32
        name = str(source)
        # bfloat16 keeps fewer digits than the fingerprint is of, which is taken before they are lost
        pipeline, preset = _read(name, torch.float32 if dtype is torch.bfloat16 else dtype)
        files = DiffusionModel(pipeline, preset) if dtype is torch.bfloat16 else None
        known = files and files.fingerprint() and files._fingerprints
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            if dtype not in ("auto", part.dtype):
                part.to(dtype)
    model = DiffusionModel(pipeline, preset, name)
    model._fingerprints = known
    return model


def _read(source: str, dtype: torch.dtype) -> tuple[DiffusionPipeline, str]:
    closed = source in worlds.WORLDS
    folder = worlds.WORLDS[source] / "model" if closed else Path(source)
    if folder.is_file():
        raise ValueError(
            f"{folder} is a single file: load it with StableDiffusionPipeline.from_single_file, then ek.load(pipeline)"
        )
    local = closed or folder.exists()
    if local and not (folder / "model_index.json").is_file():
        if closed:
            raise FileNotFoundError(
                f"the {source} model is not in {folder}: restore it with `git checkout -- data/emoji/model`; an "
                "installed erasekit finds it where ERASEKIT_WORLD names the folder data/emoji of a checkout"
            )
        raise FileNotFoundError(f"{folder} is not a diffusers folder: it has no model_index.json")
    for file in sorted(folder.rglob("*.safetensors")) if local else ():
        try:
            safe_open(file, "pt")
        except SafetensorError as error:
            advice = "restore it with git" if closed else "download or save the model again"
            raise ValueError(f"{file} is truncated or damaged ({error}): {advice}") from error
        if closed:
            worlds.verified(file.relative_to(folder.parent).as_posix(), folder.parent)
    try:
        with quietly(bars=not local):
            pipeline = DiffusionPipeline.from_pretrained(
                folder if local else source,
                dtype=dtype,
                **_no_checker(folder if local else source, local),
                local_files_only=local,
                variant="fp16" if local and _half_alone(folder) else None,
            )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]
        if local:
            raise ValueError(f"cannot load the pipeline in {folder}: {first_line}") from error
        raise FileNotFoundError(
            f"{source!r} is no folder here, and the hub did not give it: {first_line}"
        ) from error
    for part, module in pipeline.components.items():
        empty = (
            [n for n, p in module.named_parameters() if p.is_meta]
            if isinstance(module, torch.nn.Module)
            else []
        )
        if empty:
            raise ValueError(
                f"the files of {source} have no {part}.{empty[0]}: it was saved while a LoRA or another adapter was "
                "loaded, or quantized; save the pipeline again without"
            )
    note, preset = folder / NOTE, "sd"
    if local and note.is_file():
        try:
            preset = json.loads(note.read_text())["preset"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{note} is damaged, it does not say which world the model belongs to: save the model again, or delete "
                "the file where it belongs to none"
            ) from error
    return pipeline, source if closed else preset


def _no_checker(source: str | Path, local: bool) -> dict:
    """What leaves the safety checker out, for a pipeline that can have one; others would log that they do not know."""
    name = DiffusionPipeline.load_config(source, local_files_only=local).get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is not None and "safety_checker" not in inspect.signature(kind.__init__).parameters:
        return {}
    return {"safety_checker": None, "requires_safety_checker": False}


def _half_of(source: str) -> torch.dtype:
    """float16 of a UNet; bfloat16, in which they were trained, of a transformer."""
    try:
        parts = DiffusionPipeline.load_config(source, local_files_only=Path(source).exists())
    except (OSError, ValueError):
        return torch.float16  # reading the pipeline will say what is wrong
    return torch.bfloat16 if "transformer" in parts else torch.float16


def _half_alone(folder: Path) -> bool:
    """Whether a folder's denoiser is there in the variant fp16 only."""
    files = [file for part in ("unet", "transformer") for file in (folder / part).glob("*.safetensors")]
    return bool(files) and all(".fp16" in file.suffixes for file in files)


@contextmanager
def quietly(*, bars: bool = False) -> Iterator[None]:
    """Load or save a model without the notice that torchvision is missing, which no picture depends on, and without
    progress bars, which a model on disk does not need. What is said of the weights is kept. bars: keep them.
    """
    notices = logging.getLogger("transformers.utils.import_utils")
    level = notices.level
    notices.setLevel(logging.ERROR)
    silenced = () if bars else (diffusers_logging, transformers_logging)
    silenced = [log for log in silenced if log.is_progress_bar_enabled()]
    for log in silenced:
        log.disable_progress_bar()
    try:
        yield
    finally:
        notices.setLevel(level)
        for log in silenced:
            log.enable_progress_bar()


def find(fingerprint: str) -> DiffusionModel | None:
    """A model in memory with this fingerprint, if there is one."""
    return _live.get(fingerprint)
