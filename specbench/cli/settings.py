"""The schema of every setting of every verb: type, range, and rules between several settings.

The files in configs/ have the defaults and descriptions of the settings; this file has their types. There is one model
per root configuration; groups of several verbs have a separate model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import AfterValidator, Field, model_validator

from specbench.cli import schema
from specbench.cli.schema import Built, Settings, Told, show
from specbench.ranges import (
    AboveZero,
    Amount,
    AtLeastZero,
    Bytes,
    Count,
    LayerId,
    Natural,
    Penalty,
    Seconds,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    ShareWithin,
    Slots,
    Temperature,
    Threads,
    TokenId,
    Tokens,
)
from specbench.runs.run_schema import UNTRAINED


def _named(value: str) -> str:
    """One part of a path: what a run is called is the name of its folder."""
    if value in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", value) or value != value.strip() or len(value) > 200:
        raise ValueError("takes a name for a folder: without '/', not '.' or '..', of at most 200 characters")
    return value


def _path(value: str) -> str:
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise ValueError("takes a path without control characters")
    return value


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", value):
        raise ValueError(f"takes {DEVICE}")
    return value


def _codec(value: str) -> str:
    from specbench.data.cache.storage import storage

    try:
        storage(value)
    except ValueError as error:
        raise ValueError(str(error).partition(": ")[2] or str(error)) from None
    return value


def _family(value: str) -> str:
    from specbench.models.backbone import FAMILIES

    if value not in FAMILIES:
        raise ValueError(f"takes one of {', '.join(FAMILIES)}, or null")
    return value


def _without_trees(draft: str) -> bool:
    """Whether `draft` names a baseline, which proposes chains only."""
    return draft in UNTRAINED or draft.startswith("small:")


def _distinct(value: list[Any]) -> list[Any]:
    if len({str(item) for item in value}) != len(value):
        raise ValueError("takes a list without repetitions")
    return value


def _ascending(value: list[int]) -> list[int]:
    if value != sorted(set(value)):
        raise ValueError("takes layers in ascending order, each once")
    return value


def _benchmarks(value: dict[str, Any]) -> dict[str, Any]:
    found = value.get("benchmarks")
    inner = found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else []
    names = [one.get("name") for one in inner if isinstance(one, Mapping)]
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise ValueError(
            f"benchmarks name {twice[0]} twice: prompts are told apart by the names of their benchmarks; give each "
            "a name of its own"
        )
    return value


def _sizes(value: dict[str, Any]) -> dict[str, Any]:
    """Sizes of a model's raw configuration; what else is in it, the model library judges."""
    for key, found in value.items():
        if key in SIZES and (isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= 1 << 24):
            raise ValueError(f"{key}={show(found)}: takes a whole number from 1 to {1 << 24}")
        if key in POSITIVE and (isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found < 1e12):
            raise ValueError(f"{key}={show(found)}: takes a number above 0")
    for whole, part in (("num_attention_heads", "num_key_value_heads"),):
        if whole in value and part in value and value[whole] % value[part]:
            raise ValueError(f"{part}={value[part]}: takes a divisor of {whole}={value[whole]}")
    if not isinstance(value.get("model_type", ""), str):
        raise ValueError(f"model_type={show(value['model_type'])}: takes the name of an architecture")
    return value


SIZES = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "moe_intermediate_size",
        "global_head_dim",
        "num_global_key_value_heads",
        "sliding_window",
        "n_routed_experts",
        "num_experts_per_tok",
        "hc_mult",
        "index_n_heads",
        "index_head_dim",
        "index_topk",
        "o_groups",
        "o_lora_rank",
        "q_lora_rank",
    ]
)
POSITIVE = ("rms_norm_eps", "rope_theta", "initializer_range", "final_logit_softcapping")
DEVICE = "a device: auto, cpu, mps, cuda or cuda:NUMBER"
ACCELERATORS = Literal["auto", "cpu", "cuda", "gpu", "mps", "tpu"]
PRECISIONS = Literal[
    "32-true", "32", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "bf16", "16", "transformer-engine"
]

Text = Annotated[str, Field(min_length=1), Told("a text")]
Signature = Annotated[
    str, Field(pattern=r"^[^<>\x00-\x1f\x7f]+ <[^<>\s]+>$", max_length=400), Told("who signs, as NAME <ADDRESS>")
]
Name = Annotated[
    str, Field(min_length=1), AfterValidator(_named), Told("a name for a folder: a text without '/', not '.' or '..'")
]
Folder = Annotated[str, Field(min_length=1), AfterValidator(_path), Told("a path")]
Device = Annotated[str, AfterValidator(_device), Told(DEVICE)]
DType = Literal["float32", "bfloat16", "float16", "float64"]
CodecName = Annotated[str, AfterValidator(_codec), Told("the name of a codec")]
Family = Annotated[str, AfterValidator(_family), Told("the name of a family of backbones")]
Trials = Annotated[int, Field(ge=2, le=64)]
Taps = Annotated[list[LayerId], Field(min_length=1), AfterValidator(_ascending)]
Stops = list[TokenId]
TextList = list[Text]
RawConfig = Annotated[dict[str, Any], AfterValidator(_sizes), Told("the raw configuration of a model, by its keys")]
Place = Annotated[Folder | list[Folder], Told("a path, or a list of paths")]
PROGRAM = ("backbone", "tables", "target_layer_ids", "mask_token_id", "draft_vocabulary")
TRAINED = ("draft", "target_tables", "objective", "max_steps", "anchor_seed")

DraftArguments = Annotated[dict[str, Any], Built(kind="specbench.drafts.draft.Draft", given=PROGRAM)]
ObjectiveArguments = Annotated[dict[str, Any], Built(of="specbench.losses.objective.Objective", tried=True)]
TrainingArguments = Annotated[
    dict[str, Any], Built(of="specbench.training.draft_training.DraftTraining", given=TRAINED)
]
DataArguments = Annotated[
    dict[str, Any],
    Built(of="specbench.data.loading.step_data.StepData", given=("seed", "limit_samples", "rank", "world")),
]
TrackingArguments = Annotated[dict[str, Any], Built(kind="specbench.runs.wandb_tracking.Tracking")]
CallbackArguments = Annotated[dict[str, Any], Built(kind="lightning.pytorch.callbacks.Callback")]
# TensorBoard's logger gives its base root_dir itself.
LoggerArguments = Annotated[dict[str, Any], Built(kind="lightning.pytorch.loggers.Logger", given=("root_dir",))]
SuiteArguments = Annotated[
    dict[str, Any], AfterValidator(_benchmarks), Built(kind="specbench.data.prompts.benchmarks.Benchmarks")
]
SchedulerArguments = Annotated[dict[str, Any], Built(kind="specbench.decoding.scheduling.Scheduler")]
TreeArguments = Annotated[dict[str, Any], Built(kind="specbench.decoding.tree_shapes.TreeShape", tried=True)]
ProfileArguments = Annotated[dict[str, Any], Built(kind="specbench.decoding.cost_profile.CostProfile")]
PatienceArguments = Annotated[dict[str, Any], Built(kind="specbench.data.answers.servers.Patience")]
SourceArguments = Annotated[dict[str, Any], Built(given=("dropped",))]


class SamplingSettings(Settings):
    temperature: Temperature
    top_p: ShareAboveZero
    top_k: Natural
    min_p: ShareBelowOne


class AnswerSamplingSettings(SamplingSettings):
    repetition_penalty: AboveZero
    presence_penalty: Penalty


class TargetSettings(Settings):
    name: Name
    id: Folder
    revision: Text | None
    target_layer_ids: Taps | None
    mask_token_id: TokenId | None
    stop_token_ids: Stops | None
    dtype: DType
    threads: Threads | None
    device: Device
    thinking: bool | None
    max_length: Tokens
    sampling: SamplingSettings
    seed: Seed = 0
    config: RawConfig | None = None
    shapes: RawConfig | None = None


class DataSettings(Settings):
    name: Name
    source: SourceArguments
    near_duplicate: ShareAboveZero | None
    ngram: Count | None
    decontaminate: Text | TextList | None


class MethodSettings(Settings):
    name: Name
    draft: DraftArguments
    backbone: Family | None
    vocabulary: Tokens | None
    window: Tokens | None
    objective: ObjectiveArguments
    head: Text | None = None
    loss: Text | None = None
    sizes: dict[Text, dict[str, Any]] = Field({})

    @model_validator(mode="after")
    def _sizes_are_settings_of_the_draft(self) -> Method:
        for trainer, size in self.sizes.items():
            if unknown := sorted(set(size) - set(self.draft)):
                raise ValueError(
                    f"method.sizes.{trainer} sets {', '.join(unknown)}, which method.draft does not have: give it "
                    "there, with the published size"
                )
        return self

    @model_validator(mode="after")
    def _a_label_says_what_is_built(self) -> MethodSettings:
        if any(key.startswith(("markov", "confidence")) for key in self.draft):
            from specbench.cli.method_signature import fits

            fits({"name": self.name, "draft": self.draft})
        reads_markov = all(self.draft.get(key, True) for key in ("confidence_head", "confidence_with_markov"))
        if self.draft.get("markov_rank") == 0 and reads_markov:
            raise ValueError(
                "method.draft.confidence_with_markov=true with markov_rank=0: the confidence head would read a Markov "
                "embedding that is not there; use head=none, which turns it off"
            )
        built = "none" if self.draft.get("markov_rank") == 0 else self.draft.get("markov_head")
        if self.head is not None and built is not None and self.head != built:
            raise ValueError(
                f"method.head={self.head} with markov_head={built}, markov_rank={self.draft.get('markov_rank')}: the "
                f"runs would be labelled by a head that they do not have; choose head={built}"
            )
        return self


class ProbeSettings(Settings):
    every: Count | None
    prompts: Count
    max_new_tokens: Tokens
    temperature: Temperature


class AfterTrainingSettings(Settings):
    limit: Count | None
    max_new_tokens: Tokens


class LightningSettings(Settings):
    accelerator: ACCELERATORS
    devices: Annotated[Count | Literal["auto"] | list[Natural], Told("a number of devices, a list of them, or auto")]
    num_nodes: Count
    strategy: Annotated[
        Literal["auto", "ddp", "ddp_spawn", "fsdp", "ddp_find_unused_parameters_true"] | dict[str, Any],
        Told("auto, ddp, or the arguments of a strategy with its class as _target_"),
    ]
    precision: PRECISIONS
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    detect_anomaly: bool = False
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    enable_progress_bar: bool | None = None


class TrainerSettings(Settings):
    max_steps: Count | None
    epochs: Count | None
    recipe: TrainingArguments
    data: DataArguments
    probe: ProbeSettings
    validate_every: Count | None
    evaluation: AfterTrainingSettings
    lightning: LightningSettings

    @model_validator(mode="after")
    def _it_ends(self) -> TrainerSettings:
        if self.max_steps is None and self.epochs is None:
            raise ValueError("trainer.max_steps=null trainer.epochs=null: give one of them, so that training ends")
        return self


class ProtocolSettings(Settings):
    name: Name
    quantity: Literal["recipe", "steps", "tokens", "flops", "hours", "parameters", "round_share", "round_seconds"]
    amount: Amount | None

    @model_validator(mode="after")
    def _an_amount_of_what_is_equal(self) -> ProtocolSettings:
        if self.amount is None and self.quantity != "recipe":
            raise ValueError(f"protocol.quantity={self.quantity} protocol.amount=null: give an amount of what is equal")
        return self


class SeedsSettings(Settings):
    init: Seed
    data: Seed
    anchors: Seed


class StudySettings(Settings):
    """What `reproduce` reads of an experiment; the other verbs carry it."""

    verb: Literal["train", "evaluate", "serve"] = "train"
    train: dict[str, Any] = Field({})
    calibrate: bool = False
    tune: Trials | None = None
    target: TextList = Field([])
    stages: dict[str, TextList] = Field({})
    speed: TextList = Field([])
    trees: TextList = Field([])
    baselines: list[Literal[*UNTRAINED]] = Field([])
    caches: list[CodecName] = Field([])
    group_by: TextList = Field([])
    baseline: dict[str, Text] = Field({})


class TrainSettings(Settings):
    method: MethodSettings
    target: TargetSettings
    data: DataSettings
    suite: SuiteArguments
    trainer: TrainerSettings
    tracking: TrackingArguments
    callbacks: dict[str, CallbackArguments | None] = Field({})
    logger: dict[str, LoggerArguments | None] = Field({})
    choice: Text | None = None
    protocol: ProtocolSettings | None = None
    study: StudySettings | None = None
    root: Folder
    force: bool
    name: Name | None
    cache: Folder | None
    cache_codec: CodecName | None
    replay: Folder | None = None
    replay_share: ShareBelowOne = 0.25
    stream: bool = False
    shuffle_buffer: Count = 100
    online: bool
    plan: bool
    memory: AboveZero | None
    start: Folder
    start_previous: Literal["method", "wired", "none"] = "method"
    export_for: Literal["vllm", "sglang"] | None = None
    seed: SeedsSettings
    limit_samples: Count | None
    cache_dtype: DType | None
    on_damage: Literal["raise", "skip"]
    evaluate: bool
    temperatures: Annotated[list[Temperature], AfterValidator(_distinct)]
    max_new_tokens: Tokens
    batch_size: Count
    limit: Count | None
    fast: bool = True
    evaluation_seed: Seed

    @model_validator(mode="after")
    def _what_goes_together(self) -> TrainSettings:
        if self.evaluate and not self.temperatures:
            raise ValueError("temperatures=[]: give at least one, or evaluate=false")
        if self.start_previous != "method" and self.start not in ("target", "auto"):
            raise ValueError(
                f"start_previous={self.start_previous} with start={self.start}: it says how maps that are copied from "
                "the target read the previous token; set start=target, or start_previous=method"
            )
        if self.online and self.stream:
            raise ValueError("online=true with stream=true: one computes states, the other reads a cache; choose one")
        if self.replay is not None and (self.online or self.stream):
            raise ValueError(f"replay={self.replay} reads two caches by index: set online=false and stream=false")
        devices = self.trainer.lightning.devices
        if self.stream and not isinstance(devices, int):
            raise ValueError(
                f"stream=true with trainer.lightning.devices={devices}: give a number, because every rank reads its "
                "own shards"
            )
        return self


class TuneSettings(TrainSettings):
    trials: Trials
    span: Annotated[float, Field(gt=1, le=1000)]


class StagesSettings(Settings):
    prompts: TextList
    answers: TextList
    cache: TextList


class ReproduceSettings(TrainSettings):
    name: Text
    yes: bool
    codec: CodecName
    entity: Text | None
    project: Text
    stages: StagesSettings


class EvaluateSettings(Settings):
    target: TargetSettings
    suite: SuiteArguments
    scheduler: SchedulerArguments
    tree: TreeArguments | None = None
    tracking: TrackingArguments
    study: StudySettings | None = None
    root: Folder
    force: bool
    name: Name | None
    draft: Folder
    methods: TextList = Field(default_factory=list)
    prompts: Folder | None
    temperature: Temperature
    top_k: Natural
    top_p: ShareAboveZero
    min_p: ShareBelowOne
    max_new_tokens: Tokens
    stop_token_ids: Stops | None
    accounting: Literal["specbench", "deepspec"]
    confidence_threshold: Share | None
    slots: Slots | None
    teacher_forced: bool
    audit: bool
    audit_spacings: AtLeastZero
    thinking: bool | None
    seed: Seed
    batch_size: Count
    token_budget: Count | None
    engine: Text | None = None
    engine_model: Text | None = None
    fast: bool = True
    device: Device
    devices: Threads

    @model_validator(mode="after")
    def _what_goes_together(self) -> EvaluateSettings:
        for name in ("teacher_forced", "audit"):
            if getattr(self, name) and self.draft == "plain":
                raise ValueError(f"{name}=true examines what a draft proposes and draft=plain proposes nothing")
        if self.audit and self.temperature != 0:
            raise ValueError(
                f"audit=true with temperature={show(self.temperature)}: the audit holds texts against the target's "
                "own greedy text; use temperature=0"
            )
        if self.slots is not None and self.draft == "plain":
            raise ValueError(f"slots={self.slots} with draft=plain: plain decoding proposes nothing; leave slots out")
        if self.tree is not None:
            if self.draft == "plain" or _without_trees(self.draft):
                raise ValueError(f"draft={self.draft} with a tree: it has no token tree; use tree=chain")
            if self.accounting != "specbench":
                raise ValueError(
                    f"accounting={self.accounting} with a tree: it counts chains; use accounting=specbench"
                )
            if self.confidence_threshold is not None:
                raise ValueError(
                    f"confidence_threshold={self.confidence_threshold} with a tree: it cuts chains; set the budget of "
                    "the tree, or use tree=chain"
                )
        return self


class PackingSettings(Settings):
    row_length: Tokens
    vocabulary: Tokens


class StepTimesSettings(Settings):
    parts: Annotated[
        list[Literal["dspark", "eagle3", "terms", "packing"]], Field(min_length=1), AfterValidator(_distinct)
    ]
    shape: Literal["small", "qwen3_4b"] | None
    sizes: Annotated[dict[str, Any], Built(of="specbench.profiling.training_speed.StepShape")] | None
    threads: Threads
    repeats: Count
    warmup: Natural
    packing: PackingSettings


class SpeedSettings(Settings):
    tracking: TrackingArguments
    target: TargetSettings
    suite: SuiteArguments
    tree: TreeArguments | None = None
    tree_budgets: Annotated[list[Count], AfterValidator(_distinct)] = Field(default_factory=list)
    root: Folder
    name: Name | None
    force: bool
    what: Literal["decode", "train"]
    draft: Folder | None
    methods: TextList = Field(default_factory=list)
    slots: Slots | None
    prompts: Folder | None
    batch_sizes: Annotated[list[Count], Field(min_length=1), AfterValidator(_distinct)]
    lengths: Annotated[list[Slots], AfterValidator(_distinct)]
    context: Tokens
    repeats: Count
    warmup: Natural
    step_tokens: Tokens
    check: list[Count]
    clock_prompts: Count
    batch_size: Count
    clock_repeats: Count
    clock_library: bool
    max_new_tokens: Tokens
    temperature: Temperature
    thinking: bool | None
    fast: bool = True
    device: Device
    stop_token_ids: Stops | None
    train: StepTimesSettings

    @model_validator(mode="after")
    def _something_is_timed(self) -> SpeedSettings:
        if self.what == "decode" and self.draft is None:
            raise ValueError(
                "speed needs draft=... (a draft folder, a training run or a baseline), or `specbench speed train`"
            )
        if self.draft == "plain":
            raise ValueError("draft=plain is what every draft is timed against; name another one")
        if self.tree is not None and self.draft is not None and _without_trees(self.draft):
            raise ValueError(f"draft={self.draft} with a tree: it has no token tree; use tree=chain")
        return self


class PromptsSettings(Settings):
    tracking: TrackingArguments
    data: DataSettings
    root: Folder
    force: bool
    validation: ShareBelowOne
    near_duplicate: ShareAboveZero | None
    ngram: Count | None
    decontaminate: Text | TextList | None
    prompts: Folder | None
    seed: Seed


class AnswersSettings(Settings):
    tracking: TrackingArguments
    target: TargetSettings
    data: DataSettings
    root: Folder
    force: bool
    split: Literal["train", "validation"]
    count: Count | None
    preview: Count | None
    thinking: bool | None
    sampling: AnswerSamplingSettings
    max_new_tokens: Tokens
    seed: Seed
    servers: Annotated[TextList, AfterValidator(_distinct)]
    model: Text
    api_key: Text
    concurrency: Threads
    patience: PatienceArguments
    fast: bool = True
    device: Device
    batch_size: Count
    token_budget: Count | None
    keep_states: bool = False
    chunk: Count

    @model_validator(mode="after")
    def _servers_are_addresses(self) -> AnswersSettings:
        for url in self.servers:
            if not re.match(r"https?://[^/\s]+", url):
                raise ValueError(f"servers={show(self.servers)}: takes base URLs, as in [http://localhost:8000/v1]")
        if self.keep_states and self.servers:
            raise ValueError(
                "keep_states=true with servers=: servers give no states; leave one of them out, and `specbench cache` "
                "computes the states"
            )
        return self


class CacheSettings(Settings):
    tracking: TrackingArguments
    target: TargetSettings
    data: DataSettings
    root: Folder
    force: bool
    plan: bool
    answers: Folder | None
    folder: Folder | None
    codec: CodecName
    last_codec: CodecName | None
    kept_states: bool = True
    last_rows: Literal["all", "supervised"]
    max_length: Tokens
    thinking: bool | None
    shard_bytes: Bytes
    batch_tokens: Tokens
    fast: bool = True
    device: Device


class CalibrateSettings(Settings):
    tracking: TrackingArguments
    root: Folder
    name: Name
    force: bool
    rounds: Folder
    held_out: Folder | None
    share: ShareWithin
    seed: Seed
    bins: Threads
    draft: Folder | None


class ServedPolicySettings(Settings):
    scheduler: SchedulerArguments
    rounds: Folder | None = None
    calibration: Folder | None = None


class ServeSettings(Settings):
    tracking: TrackingArguments
    profile: ProfileArguments
    study: StudySettings | None = None
    root: Folder
    name: Name
    force: bool
    rounds: Folder
    calibration: Folder | None
    concurrency: list[Count]
    steps: Count
    warmup: Natural
    rate: list[AboveZero]
    requests: Count
    max_concurrency: Count
    seed: Seed
    floors: list[AboveZero]
    baseline: Text
    policies: dict[str, ServedPolicySettings | None]

    @model_validator(mode="after")
    def _there_is_load_and_a_baseline(self) -> ServeSettings:
        if not self.concurrency and not self.rate:
            raise ValueError("concurrency=[] rate=[]: give users, arrivals or both, or there is no load")
        kept = [name for name, policy in self.policies.items() if policy is not None]
        if not kept:
            raise ValueError("policies names none; keep at least one")
        if self.baseline not in kept:
            raise ValueError(f"baseline={self.baseline}: takes one of the policies, {', '.join(kept)}")
        return self


class FiltersSettings(Settings):
    target: Any
    method: Any
    suite: Any
    benchmark: Any
    domain: Any
    temperature: Any
    scheduler: Any
    accounting: Any
    thinking: Any

    @model_validator(mode="after")
    def _values_not_mappings(self) -> FiltersSettings:
        for name, value in self:
            if (
                any(isinstance(item, Mapping) for item in (value if isinstance(value, list) else [value]))
                or value == []
            ):
                raise ValueError(f"{name}={show(value)}: takes one value, several with commas, or null for any")
        return self


class CompareSettings(Settings):
    root: Folder
    name: Name
    runs: Place
    filters: FiltersSettings
    where: Annotated[str | TextList, Told("conditions such as key=value or key!=value, or a list of them")]
    group_by: Annotated[Text | TextList, Told("a key, or a list of keys")]
    resamples: Count
    seed: Seed
    minimum_shared: Share
    holm: bool
    calibrations: list[Folder]
    published: bool | None
    figures: bool
    appendix: bool = False

    @model_validator(mode="after")
    def _conditions(self) -> CompareSettings:
        for word in self.where.split() if isinstance(self.where, str) else self.where:
            if not re.fullmatch(r"[^=!\s]+!?=.*", word):
                raise ValueError(f"where={show(self.where)}: takes conditions such as key=value or key!=value")
        if self.runs == []:
            raise ValueError("runs=[]: name at least one run, or a folder above some")
        return self


class PowerSettings(Settings):
    root: Folder
    name: Name
    runs: Place
    filters: FiltersSettings
    where: Annotated[str | TextList, Told("conditions such as key=value or key!=value, or a list of them")]
    group_by: Annotated[Text | TextList, Told("a key, or a list of keys")]
    gap: AboveZero
    power: Annotated[float, Field(gt=0, lt=1), Told("a probability between 0 and 1")]
    prompts: list[Annotated[int, Field(ge=2), Told("two prompts or more")]]
    seeds: list[Annotated[int, Field(ge=3), Told("three seeds or more, as a verdict about methods needs")]]
    spread: AboveZero | None

    @model_validator(mode="after")
    def _there_are_seeds(self) -> PowerSettings:
        if not self.seeds:
            raise ValueError("seeds=[]: name the numbers of trainings to plan for, e.g. seeds=[3,5]")
        return self


class ReportSettings(CompareSettings):
    title: Text | None
    entity: Text | None
    project: Text


class ExportSettings(Settings):
    root: Folder
    draft: Folder
    methods: TextList = Field(default_factory=list)
    format: Literal["deepspec", "vllm", "sglang", "zlab", "specbench"]
    folder: Folder | None
    target_id: Folder | None
    evaluations: list[Folder] | None
    licence: Text | None
    push: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$"), Told("a hub id OWNER/NAME")] | None
    private: bool
    force: bool


class ImportSettings(Settings):
    root: Folder
    draft: Folder
    methods: TextList = Field(default_factory=list)
    revision: Text | None
    folder: Folder | None
    target_id: Folder | None
    target_layer_ids: Taps | None
    force: bool


class SubmitSettings(Settings):
    runs: Place
    results: Folder
    signed_off_by: Signature
    place: Text | None
    force: bool

    @model_validator(mode="after")
    def _something_is_submitted(self) -> SubmitSettings:
        if self.runs == []:
            raise ValueError("runs=[]: name at least one run folder of an evaluation")
        return self


class CheckSubmissionSettings(Settings):
    target: TargetSettings | None = None
    files: Place
    draft: Folder | None
    methods: TextList = Field(default_factory=list)
    prompts: Folder | None
    decode: Count
    seed: Seed | None
    verified_by: Signature | None
    fast: bool = True
    device: Device

    @model_validator(mode="after")
    def _something_is_checked(self) -> CheckSubmissionSettings:
        if self.files == []:
            raise ValueError("files=[]: name at least one result file")
        return self


class LeaderboardSettings(Settings):
    results: Folder
    root: Folder
    folder: Folder
    title: Text


class SyncSettings(Settings):
    root: Folder
    run: Folder | None


class StatusSettings(Settings):
    root: Folder
    as_json: Annotated[bool, Field(alias="json")]


class DocsSettings(Settings):
    page: Text | None
    browser: bool


class CompletionSettings(Settings):
    shell: Literal["bash", "zsh", "fish"]


class RerunSettings(Settings):
    run: Folder
    classes: TextList = Field(default_factory=list)
    name: Name | None
    root: Folder | None
    seconds: bool
    strict: bool
    force: bool


class RemakeSettings(Settings):
    remake: bool
    seconds: Seconds


class ClockSettings(Settings):
    prompts: Natural
    repeats: Count
    max_new_tokens: Tokens


class QuickstartSettings(Settings):
    tracking: TrackingArguments
    root: Folder
    force: bool
    seed: Seed
    target: RemakeSettings
    methods: Annotated[list[Name], Field(min_length=1), AfterValidator(_distinct)]
    temperatures: Annotated[list[Temperature], Field(min_length=1), AfterValidator(_distinct)]
    prompts: Count
    held_out: Count
    benchmark_prompts: Count
    max_new_tokens: Tokens
    clock: ClockSettings
    codec: CodecName
    steps: Count
    slots: Slots
    docs: Folder | None

    @model_validator(mode="after")
    def _methods_exist(self) -> QuickstartSettings:
        from specbench.cli.config_groups import known_options

        if unknown := [name for name in self.methods if name not in known_options("method")]:
            raise ValueError(
                f"methods={show(self.methods)}: there is no method {unknown[0]} (there are "
                f"{', '.join(known_options('method'))})"
            )
        return self


class PretrainerSettings(Settings):
    max_steps: Count
    accelerator: ACCELERATORS
    devices: Count
    enable_progress_bar: bool


class PretrainSettings(Settings):
    source: Literal["pretrain", "gguf"] | None
    path: Folder | None
    package: Text | None
    tokenizer: Folder | None
    suggest: Text | None
    tracking: TrackingArguments
    check: Text | None
    check_dtype: DType
    root: Folder
    force: bool
    name: Name
    folder: Folder
    vocabulary: Annotated[int, Field(ge=260, le=1 << 20)]
    dtype: DType
    compile: bool
    start: Folder | None
    model: RawConfig
    data: Annotated[dict[str, Any], Built(kind="specbench.training.pretraining.CorpusBatches", given=("tokenizer",))]
    training: Annotated[dict[str, Any], Built(kind="specbench.training.pretraining.LanguageModeling", given=("model",))]
    seed: Seed
    every: Count
    trainer: PretrainerSettings

    @model_validator(mode="after")
    def _one_source(self) -> PretrainSettings:
        given = [f"{key}={value}" for key, value in (("path", self.path), ("package", self.package)) if value]
        if len(given) > 1:
            raise ValueError(f"{' '.join(given)}: a target is made from one of them")
        if self.source == "gguf" and not given:
            raise ValueError("source=gguf: give path=FILE.gguf or package=NAME")
        if self.source == "pretrain" and given:
            raise ValueError(f"source=pretrain {given[0]}: a target that is trained takes neither path nor package")
        if self.tokenizer is not None and not given:
            raise ValueError(f"tokenizer={self.tokenizer}: goes with path=FILE.gguf or package=NAME")
        if self.start is not None and given:
            raise ValueError(f"start={self.start} {given[0]}: only a target that is trained starts from another")
        return self


# By root configuration.
SCHEMAS: dict[str, type[Settings]] = {
    "quickstart": QuickstartSettings,
    "pretrain": PretrainSettings,
    "prompts": PromptsSettings,
    "answers": AnswersSettings,
    "cache": CacheSettings,
    "train": TrainSettings,
    "tune": TuneSettings,
    "evaluate": EvaluateSettings,
    "speed": SpeedSettings,
    "calibrate": CalibrateSettings,
    "serve": ServeSettings,
    "compare": CompareSettings,
    "power": PowerSettings,
    "report": ReportSettings,
    "export": ExportSettings,
    "import": ImportSettings,
    "submit": SubmitSettings,
    "check_submission": CheckSubmissionSettings,
    "leaderboard": LeaderboardSettings,
    "sync": SyncSettings,
    "rerun": RerunSettings,
    "reproduce": ReproduceSettings,
    "status": StatusSettings,
    "docs": DocsSettings,
    "completion": CompletionSettings,
}


def check_settings(verb: str, cfg: DictConfig | Mapping[str, Any]) -> None:
    """Raise ValueError naming the first invalid setting of the resolved configuration of `verb`.

    `verb` is a verb or its root configuration; one without a schema passes. Reads no file and changes nothing.
    """
    from specbench.cli.verbs import VERBS

    config = verb if verb in SCHEMAS else VERBS[verb].config if verb in VERBS else verb
    model = SCHEMAS.get(config)
    if model is None:
        return
    settings = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    schema.check(model, {key: value for key, value in settings.items() if key != "hydra"})


def takes(config: str, key: str, settings: Mapping[str, Any] | None = None) -> str:
    """What a setting of a root configuration takes, in words; "" where no schema says it.

    `settings` are those of the whole configuration, which name the classes whose arguments may be meant.
    """
    model = SCHEMAS.get(config)
    if model is None:
        return ""
    annotation, metadata = schema.annotation_at(model, key.split("."), settings)
    return "" if annotation is Any and not metadata else schema.describe(annotation, metadata)
