"""The configuration of ``kore run``: every key, its type and its default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from kore.augmentation.config import AugmentConfig
from kore.metrics import CemRule, F1Rule
from kore.recipes import RECIPES, SECTIONS, describe, with_recipe
from kore.sizes import parse_bytes
from kore.training import TrainConfig

if TYPE_CHECKING:
    from kore.baselines import Baseline

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path | dict) else value


def _weights(value: Any) -> Any:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    numbers = items is not None and all(isinstance(item, int | float) and not isinstance(item, bool) for item in items)
    if value in (None, "balanced") or numbers:
        return value
    raise ValueError("expected balanced, a list of numbers, or a number for each name")


class ExistingFile:
    """Marks a path that must be a file."""


class ExistingDirectory:
    """Marks a path that must be a directory."""


InputFile = Annotated[Path, ExistingFile()]
InputDirectory = Annotated[Path, ExistingDirectory()]
InputFiles = Annotated[list[InputFile], BeforeValidator(_as_list), Field(min_length=1)]
Format = Literal["auto", "llava", "sharegpt", "openai"]
OnBadRow = Literal["fail", "skip"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    path: str
    """A directory written by ``save_pretrained``, or a hub id (owner/name)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"


class DataSection(Section):
    """Conversations to read."""

    files: InputFiles
    image_root: InputDirectory | None = None
    format: Format = "auto"
    on_bad_row: OnBadRow = "fail"
    max_samples: int | None = Field(default=None, ge=1)

    @property
    def there(self) -> bool:
        """Whether all files are there; those that an earlier stage makes may not be yet."""
        return all(file.is_file() for file in self.files)


class NewSection(DataSection):
    """What the model shall learn: ``files``, and what the ``augment`` section makes."""

    files: Annotated[list[InputFile], BeforeValidator(_as_list)] = []


class AugmentSection(AugmentConfig):
    """Conversations made from pieces of knowledge, as by ``kore augment``."""

    knowledge: Path
    """JSONL, JSON, CSV, TSV or Parquet, or the directory of a saved dataset."""


class OldSection(DataSection):
    """What the model already knows: the conversations whose inputs the adapter must leave alone."""

    max_samples: int | None = Field(default=256, ge=1)
    groups: list[str] | None = None
    """The group of each file, in the order of ``files``; null: every file is a group of its own."""
    balance: bool | None = None
    """Whether each group contributes the same trace to every covariance, however many tokens it has. null: yes where
    there are several groups. false: one sum over all tokens, as in the paper."""

    @model_validator(mode="after")
    def _grouped(self) -> OldSection:
        if self.groups is not None and len(self.groups) != len(self.files):
            raise ValueError(
                f"groups: expected one name for each of the {len(self.files)} files, got {len(self.groups)}"
            )
        if self.balance and len(set(self.file_groups())) == 1:
            raise ValueError("balance: there is one group, nothing to balance; name several files or groups")
        return self

    def file_groups(self) -> list[str]:
        """The group of each file: its name in ``groups``, else the file's stem, or its path where stems repeat."""
        if self.groups is not None:
            return self.groups
        stems = [file.stem for file in self.files]
        return stems if len(set(stems)) == len(set(self.files)) else [str(file) for file in self.files]

    @property
    def balanced(self) -> bool:
        """Whether the covariances of the groups are captured one by one and balanced."""
        return len(set(self.file_groups())) > 1 if self.balance is None else self.balance


class CaptureSection(Section):
    targets: str | list[str] | None = None
    normalize: Literal["none", "official"] = "none"
    batch_size: int = Field(default=4, ge=1)
    checkpoint_every: int = Field(default=16, ge=1)
    dtype: Literal["float32", "float64"] = "float32"
    tokens: Literal["prompt", "all", "image", "text", "answer"] = "prompt"
    """Which tokens count. "prompt" are those before the last answer, the others are chosen from the whole text."""
    memory_budget: int | str | None = None
    """Bytes, or text like 12GiB, for the matrices and token buffers on each device; null is no limit."""
    keep_groups: bool = True
    """Keep the covariances of the single groups of old data beside their balanced sum, for ``adapter.groups``; each
    takes as much disk as the sum."""
    new_samples: int = Field(default=0, ge=0)
    """Also capture this many samples of the new data, for the leak on new inputs in the report."""

    @field_validator("memory_budget")
    @classmethod
    def _bytes(cls, value: int | str | None) -> int | str | None:
        if value is not None:
            parse_bytes(value)
        return value


class AdapterSection(Section):
    method: str = "kore"
    """One of :data:`kore.baselines.METHODS`."""
    options: dict[str, Any] = {}
    """The method's own hyper-parameters, such as ``share`` of method replay."""

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        from kore.baselines import METHODS

        if value not in METHODS:
            raise ValueError(f"expected one of {', '.join(METHODS)}")
        return value

    rank: int | str = 64
    targets: str | list[str] | None = None
    """The adapted layers; null: those of ``capture.targets``."""
    lora_alpha: int | None = Field(default=None, ge=1)
    """For method lora; null: twice the rank. The other methods scale by 1."""
    scale: Literal["sqrt", "orthonormal"] = "sqrt"
    modules_to_save: Literal["auto"] | list[str] | None = "auto"
    """Modules trained in full beside the adapter; "auto" is the multimodal projector, null is none."""
    solver: Literal["auto", "eigh", "randomized", "svd"] = "auto"
    train_a: bool = False
    """For method kore: train A too; the adapter then has rank 2r, one half of it constant."""
    strength: float = 1.0
    """For method kore: between no constraint (0) and the null space (1)."""
    groups: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)] | None = None
    """The groups of old data whose covariances count, of those that a balanced capture has; null: all."""
    weights: Annotated[Literal["balanced"] | list[float] | dict[str, float] | None, BeforeValidator(_weights)] = None
    """The weight of each group (or of each covariance of ``kore init``), in order or by name; "balanced", or null:
    each contributes the same trace. With names, ``groups`` may be left out."""

    @property
    def needs_covariance(self) -> bool:
        """Whether the method reads the old inputs' null space."""
        return self.baseline().reads_covariance

    def baseline(self) -> Baseline:
        """The method with its options. Raises ConfigError where there is none."""
        from kore.baselines import baseline

        return baseline(self.method, **self.options)

    @property
    def chosen_groups(self) -> list[str] | None:
        """The groups, from ``groups`` or the names of ``weights``."""
        if self.groups is None and isinstance(self.weights, dict):
            return list(self.weights)
        return self.groups

    @model_validator(mode="after")
    def _variant(self) -> AdapterSection:
        from kore.errors import ConfigError

        try:
            self.baseline()
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength: expected a number above 0 and up to 1, got {self.strength}")
        mixed = [name for name in ("groups", "weights") if getattr(self, name) is not None]
        if mixed and not self.needs_covariance:
            raise ValueError(f"{mixed[0]}: method {self.method} reads no covariance; leave {mixed[0]} out")
        groups = self.chosen_groups
        if groups is not None and len(set(groups)) < len(groups):
            raise ValueError("groups: one is named twice; give it a larger weight instead")
        try:
            if groups is not None:
                from kore.mixing import check_weights

                check_weights(groups, self.weights)
            if self.train_a or self.strength != 1 or self.method.startswith("lora-null"):
                from kore.adapter.config import KoreConfig
                from kore.baselines import check_options

                check_options(self.method, self.scale, self.train_a, self.strength)
                KoreConfig(rank=self.rank, strength=self.strength)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @field_validator("rank", mode="before")
    @classmethod
    def _rank(cls, value: Any) -> Any:
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if whole or (isinstance(value, str) and _is_rank(value)):
            return value
        raise ValueError(
            "expected a whole number of 1 or more, match-lora-R (for example match-lora-128), or energy:τ with "
            "0 < τ < 1 (for example energy:0.001)"
        )


def _is_rank(text: str) -> bool:
    from kore.adapter.rank import is_rank

    return is_rank(text)


class ProtectionSection(Section):
    """Two-sided protection: what leaks through A costs what it does to the old model's answers."""

    strength: Annotated[float, Field(ge=0)] | Literal["auto"] | None = None
    """λ of :func:`kore.two_sided`; null: none. At 0.5 a nat lost for each old token costs as much as a nat for each
    new answer token. "auto": λ = L0 / (2 · max_divergence), L0 being the untouched model's loss on the new answers."""
    max_divergence: float = Field(default=0.03, gt=0)
    """For strength auto: nats for each old token that the trained adapter may cost, by the penalty's own estimate."""
    tokens: Literal["text", "all", "answer"] = "text"
    """At which predictions on old data the loss is taken: of "text" tokens, of "all", or of "answer" tokens."""
    components: int | None = Field(default=None, ge=1)
    """Keep so many components of each layer's G and the diagonal of the rest; null: all of G, d_out² numbers."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the components are kept in training; bfloat16 only with ``components``."""
    batch_size: int = Field(default=4, ge=1)
    """Samples for each forward and backward pass when G is captured."""
    memory_budget: int | str | None = None
    """As in ``capture``, for the matrices of the output gradients."""

    @field_validator("memory_budget")
    @classmethod
    def _bytes(cls, value: int | str | None) -> int | str | None:
        return CaptureSection._bytes(value)

    @model_validator(mode="after")
    def _factors(self) -> ProtectionSection:
        if self.dtype == "bfloat16" and self.components is None:
            raise ValueError("dtype: bfloat16 needs components; a whole G rounded to bfloat16 has negative eigenvalues")
        return self


class TrainSection(TrainConfig):
    """The training configuration, and how many processes share the work."""

    processes: int = Field(default=1, ge=1)

    def settings(self) -> TrainConfig:
        """The part that ``kore.train`` takes."""
        return TrainConfig(**self.model_dump(exclude={"processes"}))


class QuestionSet(Section):
    file: InputFile
    name: str = ""
    """A short name, used for the folder of its answers; the file's stem if not given."""
    image_root: InputDirectory | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if isinstance(values, str | Path):
            values = {"file": values}
        if isinstance(values, dict) and not values.get("name") and values.get("file"):
            values = {**values, "name": Path(str(values["file"])).stem}
        return values

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("expected a short name of letters, digits, '-', '_' and '.'")
        return value


QuestionSets = Annotated[list[QuestionSet], BeforeValidator(_as_list)]


class EvalSection(Section):
    """Questions asked before and after: ``new`` gives K.A (mean of CEM and F1), ``old`` gives K.R (mean CEM)."""

    new: QuestionSets = []
    old: QuestionSets = []
    max_new_tokens: int = Field(default=32, ge=1)
    batch_size: int = Field(default=8, ge=1)
    cem: CemRule = "vqa"
    """How texts are compared for CEM: after the normalisation of VQA, as EVOKE does, or of SQuAD."""
    f1: F1Rule = "multiset"
    """Words counted as often as said, as in EVOKE's code, or once ("set"), as in the paper's formula."""
    on_bad_row: OnBadRow = "fail"
    """"skip" leaves out bad rows, images that cannot be read and prompts that are too long for the model."""

    @model_validator(mode="after")
    def _distinct(self) -> EvalSection:
        for group in (self.new, self.old):
            names = [questions.name for questions in group]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice:
                raise ValueError(f"two question sets are named {twice!r}; give each its own name")
        return self


class RunConfig(Section):
    """One run: a model, its old data, the new knowledge, and what to do with them."""

    output_dir: Path
    seed: int = 0
    recipe: Literal["default", "paper", "official"] = "default"
    """Whose values the keys have that are not given, see :mod:`kore.recipes`."""
    model: ModelSection
    old: OldSection | None = None
    capture: CaptureSection = CaptureSection()
    adapter: AdapterSection = AdapterSection()
    augment: AugmentSection | None = None
    new: NewSection = NewSection()
    train: TrainSection = Field(default_factory=lambda: TrainSection.model_validate({}))
    protection: ProtectionSection = ProtectionSection()
    eval: EvalSection = EvalSection()

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, values: Any) -> Any:
        """The top-level seed is also that of training and augmentation, unless their own ``seed`` says otherwise."""
        if isinstance(values, dict) and "seed" in values:
            for name in ("train", "augment"):
                section = values.get(name) or {}
                if isinstance(section, dict) and "seed" not in section and (section or name == "train"):
                    values = {**values, name: {**section, "seed": values["seed"]}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _recipe_values(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("recipe", "default") in RECIPES:
            return with_recipe(values.get("recipe", "default"), values)
        return values

    @model_validator(mode="after")
    def _new_data(self) -> RunConfig:
        if self.augment is None and not self.new.files:
            raise ValueError("new.files: expected the files of the new data, or an augment section that makes them")
        if self.augment is not None and self.new.image_root is not None:
            raise ValueError("new.image_root: the augmented data have a folder of their own; leave image_root out")
        return self

    @property
    def augmented(self) -> Path:
        """The conversations that the ``augment`` section makes."""
        return self.output_dir / "augment" / "llava.json"

    @property
    def new_data(self) -> DataSection:
        """The new data: what the ``augment`` section makes, and the files of ``new``."""
        made = [] if self.augment is None else [self.augmented]
        return self.new.model_copy(update={"files": [*made, *self.new.files]})

    @property
    def old_conversations(self) -> DataSection | None:
        """All old conversations, for the methods that train on them; ``old.max_samples`` is for capture alone."""
        if self.old is None or not self.adapter.baseline().reads_old:
            return None
        return DataSection(**{name: getattr(self.old, name) for name in DataSection.model_fields}).model_copy(
            update={"max_samples": None}
        )

    @model_validator(mode="after")
    def _old_data_for_protection(self) -> RunConfig:
        if self.protection.strength is not None:
            if self.old is None:
                raise ValueError("protection: it needs old data; add old.files, or leave protection.strength out")
            if self.adapter.baseline().trains_a or self.adapter.train_a:
                raise ValueError("protection: it needs a frozen A, so method kore, random-a or lora-null-v2")
        return self

    @model_validator(mode="after")
    def _old_data_for_kore(self) -> RunConfig:
        method = self.adapter.baseline()
        reads = method.reads_covariance or method.penalty_reads_covariance or method.reads_old
        if reads and self.old is None:
            raise ValueError(
                f"old: method {method.method} needs old data to protect; add old.files, or choose another method"
            )
        return self

    @model_validator(mode="after")
    def _groups_of_old_data(self) -> RunConfig:
        groups = self.adapter.chosen_groups
        if groups is None:
            if self.adapter.weights is not None:
                raise ValueError("adapter.weights: expected adapter.groups with it, or a weight by name for each group")
            return self
        assert self.old is not None
        if not self.old.balanced:
            raise ValueError("adapter.groups: expected old data of several groups, with old.balance not false")
        known = list(dict.fromkeys(self.old.file_groups()))
        for group in groups:
            if group not in known:
                from kore.mixing import unknown_group

                raise ValueError(f"adapter.groups: {unknown_group(group, known)}")
        if not self.capture.keep_groups:
            raise ValueError("adapter.groups: expected capture.keep_groups not to be false")
        return self

    def described(self, *sections: str) -> dict[str, Any]:
        """The recipe and what differs from it, as ``kore.json`` holds it; of all sections if none is named."""
        chosen = {name: getattr(self, name) for name in sections or SECTIONS}
        given = {name: values.model_dump(mode="json") for name, values in chosen.items() if values is not None}
        return describe(self.recipe, given)

    def recipe_line(self) -> str:
        """The recipe and what differs from it, in one line."""
        changed = ", ".join(f"{key}: {value}" for key, value in self.described()["changed"].items())
        return f"{self.recipe}, with {changed}" if changed else f"{self.recipe}, unchanged"
