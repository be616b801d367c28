"""What the attacks share: the goal, what one attempt records, prompts with free tokens, and work that resumes.

Every attack has `Config`, `PRESETS` and

    run(model, prompts, *, goal, seeds, ..., config=None, generator=None) -> AttackResult

prompts and seeds are zipped as in `generate`; each pair is one attempt. The model is the victim, as it is or inside
`with edit.applied(model):`, and is never changed. `goal` is a Measure: what the judge must see on a picture for a
success. Attacks find a text, an embedding, latents or weights, draw with it, and ask the judge.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL.Image import Image
from torch import Tensor
from tqdm.auto import tqdm

from erasekit.conditioning import Conditioning, predict, told
from erasekit.evaluate import metrics, runs
from erasekit.evaluate.judges import JUDGES, checked
from erasekit.evaluate.protocols import Measure, Prompt, Protocol
from erasekit.evaluate.records import ATTACKED, ORIGINAL, EditMade, Result, measurements
from erasekit.models import DiffusionModel
from erasekit.paths import BUILD
from erasekit.sampling import ddim
from erasekit.tokens import embed, fits, layout
from erasekit.tuning import digest

FOLDER = BUILD / "attacks"


def side_by_side(attempts: int):
    """A Config's field for how many attempts are searched at a time: it is no part of the budget."""
    return field(default=attempts, metadata={"budget": False})


def sees(*labels: str, judge: str = "emoji-object") -> Measure:
    """The goal that the judge's first choice is one of the labels."""
    if not labels:
        raise ValueError("say what the attack wants to see: sees('dog')")
    return Measure("seen", ("target",), judge, labels=labels)


def reached(goal: Measure, pictures: Sequence[Image], texts: Sequence[str]) -> list[bool]:
    """The judge's verdict on each picture; RuntimeError where it fails."""
    if not pictures:
        return []
    records = checked(JUDGES[goal.judge](), pictures, texts)
    return [
        bool(runs.reading(goal, Prompt(text), record)) for text, record in zip(texts, records, strict=True)
    ]


def as_pictures(given: Image | Sequence[Image]) -> list[Image]:
    """One picture or several as a list of RGB pictures; ValueError for one that is transparent somewhere."""
    pictures = [given] if isinstance(given, Image) else list(given)
    if any(one.mode != "RGB" and one.convert("RGBA").getextrema()[3][0] < 255 for one in pictures):
        raise ValueError("a picture is transparent: paste it on a background of your choice first")
    return [one.convert("RGB") for one in pictures]


# Results


@dataclass(frozen=True)
class Attempt:
    """One prompt and seed under attack.

    raw: the prompt as it is reaches the goal. reached: the attack does. found: the adversarial text, None where the
    attack does not end in a text. looks: pictures that the attack drew and had judged. unet, text: forward passes of
    one latent and of one prompt that the search took, those of its looks not counted. trace: the search, one dict a
    step or a block.
    """

    prompt: str
    seed: int
    raw: bool
    reached: bool
    found: str | None = None
    looks: int = 0
    unet: int = 0
    text: int = 0
    trace: tuple[dict, ...] = ()


@dataclass(frozen=True)
class AttackResult:
    """What an attack did to one victim.

    protocol: of the prompts as they are. asked: the same under this attack and its budget; results that share it stand
    in one table. config: all settings; budget: those on which success depends. needs: what the attacker has.
    learned: embeddings or the like that the attack ended in, where it has any. course: the loss of a training that all
    attempts share. model: fingerprint of the victim.
    """

    attack: str
    needs: str
    protocol: Protocol
    config: dict
    attempts: tuple[Attempt, ...]
    model: str
    edit: tuple[str, ...]
    budget: dict
    learned: Tensor | None = None
    course: tuple[dict, ...] = ()

    @property
    def asked(self) -> Protocol:
        """The protocol with the attack and its budget."""
        return replace(self.protocol, attack={"name": self.attack} | self.budget)

    def raw(self) -> dict:
        """Rate of the prompts as they are (pre-ASR of UnlearnDiffAtk)."""
        return self._rate("raw")

    def success(self) -> dict:
        """Rate of the prompts that reach the goal as they are or by the attack (ASR of UnlearnDiffAtk)."""
        return self._rate("attack")

    def alone(self) -> dict:
        """Rate of the attack by itself, whatever the prompt as it is does. UnlearnDiffAtk and P4D leave out prompts
        that reach the goal anyway; those count as no success here.
        """
        return self._rate("alone")

    def _verdicts(self, measure: str) -> list[bool]:
        return [ATTACKED[measure](vars(one)) for one in self.attempts]

    def _rate(self, measure: str) -> dict:
        return metrics.rate(sum(self._verdicts(measure)), len(self.attempts))

    def within(self, looks: int) -> dict:
        """Rate of `success` after so many looks at a picture. The last look decides: searches end with the first that
        reaches the goal, and fine-tuning counts as it ends, not by the looks on its way.
        """
        done = [one.raw or one.reached and one.looks <= looks for one in self.attempts]
        return metrics.rate(sum(done), len(done))

    def table(self) -> pd.DataFrame:
        """One row: k/n and interval of the raw prompts and of the attack, exact McNemar's p of the two, mean cost,
        protocol hash.
        """
        mean = lambda what: round(float(np.mean([getattr(one, what) for one in self.attempts])), 1)
        return pd.DataFrame(
            [
                {
                    "attack": self.attack,
                    "raw prompt": metrics.text(self.raw()),
                    "raw or attack": metrics.text(self.success()),
                    "p": metrics.mcnemar(self._verdicts("raw"), self._verdicts("attack"))["p"],
                    "looks": mean("looks"),
                    "UNet passes": mean("unet"),
                    "texts": mean("text"),
                    "protocol": self.asked.short,
                }
            ]
        )

    def result(
        self,
        command: str = "",
        *,
        erased: Sequence[str] = (),
        made: EditMade | None = None,
        victim: str | None = None,
        subject: dict | None = None,
        traces: bool = True,
    ) -> Result:
        """The measurements "raw", "attack" (`success`) and "alone" with all that they depend on, to be committed.

        made: the edit that was attacked. victim: its name where it has none ("original", "no text"). subject:
        fingerprints of the model before the edit, `world.subject`.
        """
        label = victim or (made.label if made else ORIGINAL)
        counted = {"attack": self.success(), "alone": self.alone()}
        numbers = measurements({"raw": self.raw()}, self.protocol, label, attack=self.attack)
        numbers += measurements(counted, self.asked, label, attack=self.attack)
        attempts = [asdict(one) for one in self.attempts]
        if not traces:
            attempts = [{k: v for k, v in one.items() if k != "trace"} for one in attempts]
        return Result(
            command,
            "attack",
            **(subject or {}),
            erased=tuple(erased),
            machine=runs.machine(),
            edits={made.label: made} if made else {},
            measurements=tuple(numbers),
            details={
                "attack": self.attack,
                "needs": self.needs,
                "victim": self.model,
                "config": self.config,
                "course": list(self.course),
                "attempts": attempts,
            },
        )


# The victim


@dataclass(frozen=True)
class Setting:
    """One attack on one victim: what the attempts are and where their results are kept."""

    attack: str
    needs: str
    model: DiffusionModel
    protocol: Protocol
    config: object
    raw: tuple[bool, ...]
    own: tuple[int, ...]  # a seed for each attempt's own draws
    folder: Path
    progress: bool

    @property
    def goal(self) -> Measure:
        return self.protocol.measures[0]

    @property
    def shots(self) -> list[runs.Shot]:
        return runs.shots(self.protocol)

    def generators(self) -> list[torch.Generator]:
        """A fresh generator for each attempt, on the CPU."""
        return [torch.Generator().manual_seed(seed) for seed in self.own]

    def draw(
        self, text: Conditioning, seeds: Sequence[int], model: DiffusionModel | None = None
    ) -> list[Image]:
        """Pictures of n texts, sampled as the protocol says, by the victim if no other model is given."""
        model, asked = model or self.model, self.protocol
        with runs.sampled_by(model, asked.sampler):
            return model.draw(text, seeds, steps=asked.steps, guidance=asked.guidance)

    def look(self, texts: Sequence[str], seeds: Sequence[int]) -> list[bool]:
        """Draw texts and ask the judge."""
        if not texts:
            return []
        return reached(self.goal, self.draw(self.model.conditioning(texts), seeds), texts)

    def resumed(
        self, items: Sequence[str], batch: int, work: Callable[[list[int]], list[dict]], stem: str = "search"
    ) -> list[dict]:
        """work(indices) -> one record each, for all items in pieces of `batch`. What an earlier call finished is read
        back, so that a kill costs one piece at most.
        """
        done = runs.read_sealed(self.folder, stem)
        missing = [i for i, item in enumerate(items) if item not in done]
        with tqdm(
            total=len(items),
            initial=len(items) - len(missing),
            desc=self.attack,
            unit="prompt",
            disable=not self.progress,
        ) as bar:
            for start in range(0, len(missing), batch):
                piece = missing[start : start + batch]
                records = [
                    {"shot": items[i], "record": record} for i, record in zip(piece, work(piece), strict=True)
                ]
                runs.append_sealed(self.folder / f"{stem}.0.jsonl", records)
                done |= {record["shot"]: record for record in records}
                bar.update(len(piece))
        # as JSON gives them back, whether or not they were just made
        return json.loads(json.dumps([done[item]["record"] for item in items]))

    def drawn(self, records: Sequence[dict]) -> AttackResult:
        """One look at each record's `found` text with its attempt's seed; a text that the tokenizer refuses fails."""
        shots = self.shots
        usable = [i for i, one in enumerate(records) if fits(self.model.tokenizers, one["found"])]

        def look(piece: list[int]) -> list[dict]:
            of = [usable[i] for i in piece]
            seen = self.look([records[i]["found"] for i in of], [shots[i].seed for i in of])
            return [{"reached": verdict} for verdict in seen]

        seen = self.resumed([shots[i].key for i in usable], runs.PIECE, look, stem="looks")
        verdicts = {i: one["reached"] for i, one in zip(usable, seen, strict=True)}
        complete = []
        for i, record in enumerate(records):
            found = verdicts.get(i, False)
            trace = [*record.get("trace", ()), {"look": int(i in verdicts), "reached": found}]
            complete.append(record | {"reached": found, "looks": int(i in verdicts), "trace": trace})
        return self.finished(complete)

    @property
    def log(self) -> Path:
        """Where a training writes its loss."""
        return self.folder / "loss.csv"

    def finished(self, records: Sequence[dict], learned: Tensor | None = None) -> AttackResult:
        """records: per attempt the fields of Attempt that the attack found."""
        course = pd.read_csv(self.log)[["step", "loss"]].to_dict("records") if self.log.exists() else ()
        attempts = tuple(
            Attempt(shot.prompt.text, shot.seed, raw, **{**record, "trace": tuple(record.get("trace", ()))})
            for shot, raw, record in zip(self.shots, self.raw, records, strict=True)
        )
        config = json.loads(json.dumps(asdict(self.config), default=str))
        free = {one.name for one in fields(self.config) if not one.metadata.get("budget", True)}
        return AttackResult(
            self.attack,
            self.needs,
            self.protocol,
            config,
            attempts,
            self.model.fingerprint(),
            tuple(self.model.edits_in_force()),
            {name: one for name, one in config.items() if name not in free},
            learned,
            tuple(course),
        )


def prepare(
    attack: str,
    needs: str,
    model: DiffusionModel,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    goal: Measure,
    config,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    *,
    depends: Sequence = (),
    folder: Path | None = None,
    progress: bool = False,
) -> Setting:
    """Draw and judge the prompts as they are, and find the folder of this attack on this victim.

    generator: one, from which a seed for each attempt is drawn in order, or one for each attempt (None: seed 0).
    depends: whatever else the result depends on: tensors, pictures, texts, other models. ValueError for another model
    than Stable Diffusion 1, 2 and XL, and for a goal that is no yes or no of a known judge.
    """
    model.check_drawn()
    prompts, seeds = model._pairs(prompts, seeds)
    if goal.roles != ("target",):
        raise ValueError("the goal is a Measure about the role 'target': make it with attacks.sees(...)")
    if goal.rule == "mean":
        raise ValueError(
            'a goal is reached or not, and the rule "mean" is a score: take the rule "first" or "any"'
        )
    if goal.judge not in JUDGES:
        raise ValueError(
            f"no judge is called {goal.judge!r}: take {', '.join(JUDGES)}, or register yours (judges.register)"
        )
    if len(set(zip(prompts, seeds, strict=True))) < len(prompts):
        raise ValueError("a prompt with the same seed was given twice: one attempt each")
    model.tokenized(prompts)  # none over the limit
    asked = tuple(Prompt(text, role="target", seed=seed) for text, seed in zip(prompts, seeds, strict=True))
    protocol = Protocol("attacked", asked, (goal,), steps=config.steps, guidance=config.guidance)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    each = list(generator) if isinstance(generator, Iterable) else [generator] * len(prompts)
    if len(each) != len(prompts) or not all(isinstance(one, torch.Generator) for one in each):
        raise ValueError(
            f"give one torch.Generator, or {len(prompts)}, one for each attempt, got {generator!r}"
        )
    raw = runs.run(
        model, None, protocol, folder=(folder or FOLDER).parent / runs.RUNS.name, progress=progress
    )
    own = [int(torch.randint(2**62, (), generator=one)) for one in each]
    settings = [attack, runs.model_key(model, model.edits_in_force(), protocol, None), protocol.hash]
    settings += [type(config).__module__, asdict(config), own, [digest(one) for one in depends]]
    key = hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode()).hexdigest()[:24]
    verdicts = tuple(bool(value) for value in raw.values(goal))
    place = (folder or FOLDER) / f"{attack}-{key}"
    return Setting(attack, needs, model, protocol, config, verdicts, tuple(own), place, progress)


# Prompts with free tokens


@dataclass(frozen=True, eq=False)
class Slots:
    """n prompts with free tokens, as the text encoders of a model read them; make it with `slots`.

    laid: ids and mask of the free ones, both (n, length), for each encoder.
    """

    model: DiffusionModel
    laid: tuple[tuple[Tensor, Tensor], ...]

    def text(self, rows: Tensor | None = None, at=slice(None)) -> Conditioning:
        """Of the prompts `at` (a slice, or indices), whose free tokens have the embeddings `rows` (number of free, d),
        in order; of SDXL those of both encoders side by side (`tokens.token_tables`). None: no token is free.
        """
        encoders, scale = list(self.model.text_encoders.values()), self.model.pipeline.vae_scale_factor
        laid = [(ids[at], free[at]) for ids, free in self.laid]
        if rows is None:
            return told(encoders, [ids.to(self.model.device) for ids, _ in laid], scale)
        return embed(encoders, laid, rows, scale)


def slots(model: DiffusionModel, contents: Callable[..., Sequence[Sequence[int | None]]]) -> Slots:
    """contents: of a tokenizer, the tokens of each prompt, with None for the free ones. ValueError when a prompt is too
    long, or has more free tokens for one tokenizer than for another.
    """
    laid = tuple(layout(one, contents(one)) for one in model.tokenizers)
    if any(not torch.equal(free.sum(1), laid[0][1].sum(1)) for _, free in laid):
        raise ValueError(
            "the tokenizers read a prompt as more and as fewer tokens, and leave more and fewer of them free: write it "
            "without what they read differently (of SDXL an exclamation mark)"
        )
    return Slots(model, laid)


# The diffusion loss


def latents_of(model: DiffusionModel, pictures: Sequence[Image], batch_size: int = 16) -> Tensor:
    """Latents (n, channels, height, width) of pictures: the mean of the VAE's posterior, scaled. ValueError for
    transparent pictures and for another size than the model's own.
    """
    processor, found, pictures = model.pipeline.image_processor, [], as_pictures(pictures)
    with torch.no_grad(), model.steady_vae() as vae:
        for start in range(0, len(pictures), batch_size):
            pixels = processor.preprocess(pictures[start : start + batch_size])
            found.append(model.scaled(vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean))
    latents = torch.cat(found).to(model.dtype)
    if latents.shape[-2:] != model.latent_size:
        raise ValueError(
            f"pictures give latents of {tuple(latents.shape[-2:])}, this model draws {model.latent_size}: resize them"
        )
    return latents


def noise_error(
    model: DiffusionModel, clean: Tensor, noise: Tensor, timesteps: Tensor, text: Conditioning
) -> Tensor:
    """Mean squared error (n,) of the UNet's prediction of `noise` in `clean` latents at `timesteps` (n,), given n
    texts; for models that predict v, of v.
    """
    scheduler = ddim(model.scheduler)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    predicted = predict(model.unet, noisy, timesteps, text)
    wanted = noise
    if scheduler.config.prediction_type == "v_prediction":
        wanted = scheduler.get_velocity(clean, noise, timesteps)
    return (predicted.float() - wanted.float()).square().flatten(1).mean(1)


def standard_normal(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Noise of the shape of `like`, row i from generator i, drawn in float32 on the CPU."""
    rows = [torch.randn(like.shape[1:], generator=one) for one in generators]
    return torch.stack(rows).to(like.device, like.dtype)


def unknowing(model: DiffusionModel, generator: torch.Generator) -> DiffusionModel:
    """The negative control: a copy behind text encoders with random weights, for which no word means anything."""
    copied = model.copy()
    for part, encoder in model.text_encoders.items():
        fresh = type(encoder)(encoder.config)
        with torch.no_grad():
            for name, parameter in fresh.named_parameters():
                value = (
                    torch.randn(parameter.shape, generator=generator)
                    * encoder.get_parameter(name).float().std().cpu()
                )
                parameter.copy_(
                    torch.ones_like(parameter) if "norm" in name and name.endswith("weight") else value
                )
        setattr(copied.pipeline, part, fresh.to(model.device, model.dtype).eval())
    return copied
