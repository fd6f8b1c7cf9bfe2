"""Every key of a config.json, changed in many ways: transformers' network, or a refusal that names the key.

    python -m tests.families.keys                                          the table of all families, which takes minutes
    python -m tests.families.keys --family llama --by-key                  a row for every key
    python -m tests.families.keys --family llama --key head_dim --faults   what is wrong

A folder of a small stock model is written once; one key of its config.json is changed at a time, the weights stay. transformers
loads the folder and computes logits, or fails; tiglon imports it and computes them, or refuses. What may come of it:

    used       the logits changed, and tiglon has the same
    harmless   the logits did not change, and tiglon has the same
    ignored    transformers refuses the value of a key that changes nothing whatever it is; tiglon passes over it
    refused    one sentence that names the key; where the weights no longer fit, a tensor

Everything else is a fault.
"""

import argparse
import copy
import json
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from launch.checkpoints import read_meta
from launch.commands.import_model import import_model
from launch.trained import open_checkpoint
from tests.model.huggingface.stock import ALL, LINEAR, LLAMA3, YARN, Case, save_stock, stock_logits

ROWS, LENGTH = 2, 40
"""Sequences and tokens of each: longer than every window and than the trained length of the YaRN models."""
TOLERANCE = 1e-4
"""Of logits in float32, relative to the largest one."""
ACCEPTED = "accepted, though transformers fails"
LARGE = 1000
"""A network with a larger size is built without memory first."""
LENGTHS = ("max_position_embeddings", "original_max_position_embeddings", "rope_theta")
GONE: Any = object()
"""The value of a key that is taken out of the file."""

MAIN = {
    "llama": "plain", "mistral": "window", "qwen2": "upper layers windowed", "qwen3": "windows, yarn", "smollm3": "windows",
    "olmo2": "plain", "olmo3": "yarn", "gemma3_text": "plain", "phi3": "tied, window", "mixtral": "window, yarn",
    "qwen3_moe": "first layers dense, window", "olmoe": "plain", "deepseek_v2": "experts, groups",
    "deepseek_v3": "experts, groups",
}  # fmt: skip
"""The model of each family of which all keys are changed; of the others, those that distinguish them."""
SPELLED_BOTH_WAYS = {"plain", "yarn", "window, yarn", "tied, yarn", "windows, yarn", "windows", "linear, untied"}
LARGE_EPSILON = {"rms_norm_eps": 0.1}
"""So that another epsilon shows; DeepSeek's latents are normed with 1e-6 whatever is written."""

STRINGS: dict[str, tuple[str, ...]] = {
    "hidden_act": ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "quick_gelu"),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "scoring_func": ("softmax", "sigmoid"),
    "model_type": (*MAIN, "gemma2", "gemma3", "mixtral", "gpt2"),
    "rope_type": ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional", "su", "mrope"),
    "dtype": ("float32", "bfloat16", "float16"),
}  # fmt: skip
"""Legal values of keys that hold a word."""
STRINGS |= {"hidden_activation": STRINGS["hidden_act"], "type": STRINGS["rope_type"], "torch_dtype": STRINGS["dtype"]}
HUGE = {"num_hidden_layers": 40, "n_shared_experts": 8, "n_routed_experts": 12, "num_experts": 12, "num_local_experts": 12}
"""Where a million would take long to build."""

SUBKEYS = (
    "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
    "partial_rotary_factor", "mrope_section", "finetuned", "rotary_percent",
)  # fmt: skip
"""Of rope_parameters and rope_scaling; the last two are unknown to transformers."""
OTHER_KEYS = (
    "rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window", "sliding_window_pattern", "use_sliding_window",
    "max_window_layers", "layer_types", "partial_rotary_factor", "torch_dtype", "use_cache", "pretraining_tp", "num_experts",
    "num_local_experts", "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "attn_logit_softcapping",
    "final_logit_softcapping", "use_bidirectional_attention", "no_rope_layers", "no_rope_layer_interval", "head_dim",
    "attention_bias", "mlp_bias", "qk_norm", "use_qk_norm", "query_pre_attn_scalar", "original_max_position_embeddings",
    "rope_interleave", "num_nextn_predict_layers", "attention_multiplier", "embedding_multiplier", "residual_multiplier",
    "logits_scaling", "logit_scale", "mup_multiplier", "qk_clip", "per_layer_config", "quantization_config",
    "hidden_activation", "hidden_act", "tie_word_embeddings", "qkv_bias", "scoring_func", "auto_map", "rms_norm_eps",
    "layer_norm_eps", "attn_implementation", "attention_dropout", "initializer_range", "num_key_value_heads", "max_length",
    "temperature", "tensor_parallel_size", "name_or_path", "num_labels", "n_embd",
)  # fmt: skip
"""Spellings of transformers 4, keys of other families, and keys that nobody knows; changed in every family."""
UNKNOWN = (
    "qk_norm", "use_qk_norm", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling",
    "logit_scale", "mup_multiplier", "qk_clip", "hidden_activation", "qkv_bias", "scoring_func", "auto_map", "layer_norm_eps",
    "max_length", "temperature", "tensor_parallel_size", "name_or_path", "num_labels", "n_embd", "chunk_size_feed_forward",
    "finetuned", "rotary_percent", "id2label", "label2id", "problem_type", "output_hidden_states", "return_dict",
    "is_encoder_decoder",
)  # fmt: skip
"""Of no family here, or of no text model; fewer values suffice unless the file has them."""
ABSENT = (2, 0.5, True, "x", [1])
"""Values of a subkey that the file does not have."""
LEGACY = (
    "rope_theta", "rope_local_base_freq", "torch_dtype", "max_position_embeddings", "sliding_window_pattern",
    "max_window_layers", "use_sliding_window", "no_rope_layer_interval", "rope_scaling", "layer_types",
)  # fmt: skip
"""Changed in the files that are spelled as transformers 4 did."""
THROUGH_FILES = (
    "tie_word_embeddings", "quantization_config", "dtype", "torch_dtype", "architectures", "model_type", "auto_map",
    "initializer_range",
)  # fmt: skip
"""Keys that transformers reads while it loads weights, not while it builds the network."""
NOT_CHANGED = {"transformers_version"}

PathOfKey = tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """One change of a config.json."""

    key: PathOfKey
    """Of nested keys, from the outermost on."""
    value: Any
    """GONE = the key is taken out."""

    def apply(self, config: dict[str, Any]) -> dict[str, Any]:
        """A changed copy."""
        changed = copy.deepcopy(config)
        inner = changed
        for key in self.key[:-1]:
            inner = inner[key]
        if self.value is GONE:
            inner.pop(self.key[-1], None)
        else:
            inner[self.key[-1]] = self.value
        return changed

    @property
    def names(self) -> set[str]:
        """Words of which a refusal must have one: the key, or what a changed table holds."""
        if self.key[-1:] in (("rope_type",), ("type",)):
            return {*self.key[-1:], *SUBKEYS}  # another kind wants other keys
        names = set(self.key[-1:]) | (set(self.value) if isinstance(self.value, dict) else set())
        return names | ({"architectures", "model_type"} if names & {"architectures", "model_type"} else set())

    def __str__(self) -> str:
        if not self.key:
            return "as transformers wrote it"
        return f"{'.'.join(self.key)} = {'(left out)' if self.value is GONE else repr(self.value)}"


@dataclass(frozen=True)
class Theirs:
    """What transformers makes of a folder."""

    logits: Tensor | None
    fault: str = ""
    """Why there are no logits."""
    unfit: bool = False
    """Whether the stored tensors are not those of the network: too few, too many, or of another shape."""

    def kind(self, base: Tensor) -> str:
        """changed, unchanged (logits), unfit or failed."""
        if self.logits is None:
            return "unfit" if self.unfit else "failed"
        return "unchanged" if same(self.logits, base) else "changed"


@dataclass(frozen=True)
class Result:
    """What came of one change."""

    case: Case
    change: Change
    outcome: str
    """used, harmless, ignored, refused, or a sentence that says what is wrong."""
    theirs: str
    """Theirs.kind."""

    @property
    def faulty(self) -> bool:
        return self.outcome not in OUTCOMES

    def __str__(self) -> str:
        return f"{self.case}: {self.change}: {self.outcome}"


OUTCOMES = ("used", "harmless", "ignored", "refused")


class Folder:
    """A saved stock model whose config.json is rewritten for every change."""

    def __init__(self, case: Case, root: Path, legacy: bool = False):
        self.case, self.path, self.output = case, root / "stock", root / "imported"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        self.tokens_BS = torch.randint(0, 96, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
        saved = save_stock(case, self.path)
        self.weights: dict[str, Tensor] = saved.state_dict()
        self.stored = set(own_tensors(saved))
        """Names in transformers' network of what the files hold, where each expert of a stack has tensors of its own."""
        self.config: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        if not case.family.startswith("deepseek"):
            self.config |= LARGE_EPSILON
        if legacy:
            self.config = legacy_spelling(self.config)
        self._ours: dict[str, Tensor] = {}
        self.write(Change((), GONE))
        base = self.theirs_by_files().logits
        assert base is not None, f"transformers does not load {case}"
        self.base = base

    def write(self, change: Change) -> None:
        """Write config.json with the change, or as it was for a change of no key."""
        (self.path / "config.json").write_text(json.dumps(change.apply(self.config) if change.key else self.config))

    def result(self, change: Change) -> Result:
        """What comes of the change."""
        self.write(change)
        theirs = self.theirs_by_files() if not change.key or change.key[0] in THROUGH_FILES else self.theirs()
        return Result(self.case, change, verdict(change, theirs, self.ours(), self.base), theirs.kind(self.base))

    def theirs(self) -> Theirs:
        """As `theirs_by_files`, in a third of the time: the network of the written configuration with the weights in memory."""
        try:
            config = transformers.AutoConfig.from_pretrained(self.path)
            if largest(config.to_dict()) > LARGE and (fault := self._unfit(self._network(config, "meta"))):
                return Theirs(None, fault, unfit=True)
            model = self._network(config, "cpu")
            if fault := self._unfit(model):
                return Theirs(None, fault, unfit=True)
            with torch.no_grad():
                for name, tensor in own_tensors(model).items():
                    tensor.copy_(self.weights[name])
            surplus = self.stored - model.state_dict().keys()
            return self._computed(model.eval(), bool(surplus))
        except Exception as error:  # whatever a wrong value brings about
            return Theirs(None, type(error).__name__)

    def theirs_by_files(self) -> Theirs:
        """As a user would load the folder."""
        settings: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32, "output_loading_info": True}
        try:
            config = transformers.AutoConfig.from_pretrained(self.path)
            if largest(config.to_dict()) > LARGE and (fault := self._unfit(self._network(config, "meta"))):
                return Theirs(None, fault, unfit=True)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(self.path, **settings)
            if missing := info["missing_keys"]:  # drawn at random
                return Theirs(None, f"{sorted(missing)[0]} is not stored", unfit=True)
            return self._computed(model.eval(), bool(info["unexpected_keys"]))
        except Exception as error:  # whatever a wrong value brings about
            return Theirs(None, type(error).__name__, unfit="mismatch" in str(error))

    def _network(self, config: Any, device: str) -> Any:
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)

    def _unfit(self, model: Any) -> str:
        """A tensor that is not stored in the shape that the network has."""
        for name, tensor in own_tensors(model).items():
            if name not in self.stored:
                return f"{name} is not stored"
            if self.weights[name].shape != tensor.shape:
                return f"{name} has another shape"
        return ""

    def _computed(self, model: Any, surplus: bool) -> Theirs:
        logits = stock_logits(model, self.tokens_BS)
        return Theirs(logits, unfit=surplus) if logits.isfinite().all() else Theirs(None, "the logits are not finite")

    def ours(self) -> Tensor | str | Exception:
        """Logits of tiglon, the sentence of a refusal, or what it crashed with."""
        shutil.rmtree(self.output, ignore_errors=True)
        try:
            import_model(self.path, self.output)
        except (ValueError, FileNotFoundError) as error:
            left = [path for path in self.output.parent.iterdir() if path != self.path]
            return RuntimeError(f"a refusal leaves {left}") if left else str(error)
        except Exception as error:
            return error
        try:
            read = json.dumps(read_meta(str(self.output)).config, sort_keys=True)
            if read not in self._ours:  # the weights are those of the same file
                decoder = open_checkpoint(str(self.output), torch.device("cpu"), torch.float32).decoder
                with torch.no_grad():
                    self._ours[read] = decoder(self.tokens_BS)
        except Exception as error:
            return error
        return self._ours[read]


def own_tensors(model: Any) -> dict[str, Tensor]:
    """What is stored of a network, by name: parameters, a tied one once, and biases of routers."""
    kept = model.state_dict()
    return dict(model.named_parameters()) | {name: each for name, each in model.named_buffers() if name in kept}


def largest(config: Any) -> float:
    """The largest number in a configuration, but for lengths and bases."""
    if isinstance(config, dict):
        return max((largest(value) for key, value in config.items() if key not in LENGTHS), default=0.0)
    return float(config) if isinstance(config, int | float) else 0.0


def legacy_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it: rope_theta, rope_scaling with `type` where there is a scaling, and no list of layers."""
    config = {key: value for key, value in copy.deepcopy(config).items() if key not in ("layer_types", "no_rope_layers")}
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:  # Gemma 3 and OLMo 3: windowed layers had a base of their own, or the same one
        local, rope = rope["sliding_attention"], rope["full_attention"]
        if config["model_type"] == "gemma3_text":
            config |= {"rope_local_base_freq": local["rope_theta"], "sliding_window_pattern": 2}
    config["rope_theta"] = rope.pop("rope_theta")
    rope.pop("partial_rotary_factor", None)
    scaling = rope.pop("rope_type")
    if scaling != "default":
        key = "rope_type" if config["model_type"] in ("gemma3_text", "olmo3") else "type"  # which was before their time
        config["rope_scaling"] = {key: scaling, **rope}
    config["torch_dtype"] = config.pop("dtype", None)
    return config


def same(one: Tensor, other: Tensor) -> bool:
    """Whether logits agree."""
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= TOLERANCE * max(1.0, float(one.abs().max())))


def verdict(change: Change, theirs: Theirs, ours: Tensor | str | Exception, base: Tensor) -> str:
    """An outcome, or what is wrong; "ignored" where transformers refuses and nothing changed, to be judged with its key."""
    if isinstance(ours, Exception):
        return f"crash: {type(ours).__name__}: {ours}"
    if isinstance(ours, str):
        if "\n" in ours:
            return f"not one sentence: {ours!r}"
        named = any(re.search(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])", ours) for name in change.names)
        misfit = (theirs.unfit or theirs.logits is None) and re.search(r"(model\.[a-z_0-9.]+|lm_head)\.(weight|bias)\b", ours)
        if not change.key:
            return f"the model is refused: {ours}"
        return "refused" if named or misfit else f"does not name it: {ours}"
    if theirs.logits is None:
        return "ignored" if not theirs.unfit and same(ours, base) else f"{ACCEPTED}: {theirs.fault}"
    if not same(theirs.logits, ours):
        return f"silently different: {_distance(theirs.logits, ours)}"
    return "harmless" if same(theirs.logits, base) else "used"


def _distance(theirs: Tensor, ours: Tensor) -> str:
    return f"off by {(theirs - ours).abs().max():.2g}" if theirs.shape == ours.shape else f"shapes {theirs.shape}, {ours.shape}"


def with_acting_keys(results: list[Result]) -> list[Result]:
    """A refusal of transformers may be passed over only where no value of the key changes the network."""
    acting = {(r.case.family, r.change.key[-1:]) for r in results if r.theirs in ("changed", "unfit")}
    return [
        replace(r, outcome=ACCEPTED) if r.outcome == "ignored" and (r.case.family, r.change.key[-1:]) in acting else r
        for r in results
    ]


def values(key: str, now: Any, size: int) -> list[Any]:
    """Other values of a key that has the value `now`.

    Args:
        size: elements of a head.
    """
    match now:
        case bool():
            other = [not now, None, "true", 1, []]
        case int():
            other = [now * 2, now + 1, 0, -1, HUGE.get(key, 10**6), now + 0.5, float(now), None, str(now), [now], True]
        case float():
            other = [now * 2, now + 1, 0.0, -now, 1e6, None, str(now), [now], True]
            other += [int(now) * 3 + 1] if now >= 1 else []  # a fraction as a whole number is no value of it
        case str():
            other = [None, "x", 3, []]
        case list():
            other = [None, [], now[::-1], now[:-1], [*now, *now[-1:]], now[:1] * len(now), ["x"] * len(now), "x", 3]
        case dict():
            other = [None, {}, 3, []]
        case _ if key in UNKNOWN:
            other = [2, True, "x"]
        case _:
            other = [12, 0, 0.5, True, "x", [1], {}]
    other = [*other, *STRINGS.get(key, ()), *special_values(key, size)]
    distinct = {f"{type(value).__name__} {value!r}": value for value in other}
    return [value for written, value in distinct.items() if written != f"{type(now).__name__} {now!r}"]


def special_values(key: str, size: int) -> list[Any]:
    """Values that make sense for one key only."""
    numbers = [1.0 + index / 4 for index in range(size // 2)]
    long = {"factor": 4.0, "short_factor": numbers, "long_factor": numbers[::-1], "original_max_position_embeddings": 32}
    local = {"rope_type": "default", "rope_theta": 300.0}
    match key:
        case "rope_parameters" | "rope_scaling":
            kinds = [YARN, LLAMA3, LINEAR, {**LINEAR, "rope_type": "dynamic"}, {"rope_type": "longrope", **long}]
            kinds += [{"rope_type": "su", **long}, {"rope_type": "proportional", "partial_rotary_factor": 0.5}, local]
            kinds += [{"rope_type": "default", "partial_rotary_factor": 0.5}, {"rope_type": "yarn"}, {"rope_theta": 300.0}]
            kinds += [{"type": "linear", "factor": 2.0}, {"type": "yarn", "factor": 4.0}, {"rope_type": None}]
            nested = [{"full_attention": YARN, "sliding_attention": local}, {"full_attention": local}]
            nested += [{"full_attention": local, "sliding_attention": LINEAR}, {"sliding_attention": local}]
            return copy.deepcopy([*kinds, *nested])
        case "architectures":
            return [["LlamaForCausalLM"], ["Qwen3ForCausalLM"], ["GPT2LMHeadModel"], ["LlamaModel"], ["Gemma3ForCausalLM"]]
        case "layer_types":
            kinds = ["full_attention", "sliding_attention", "chunked_attention", "linear_attention"]
            return [[kind] * 4 for kind in kinds] + [[*kinds[:2], *kinds[:2]]]
        case "no_rope_layers":
            return [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [True, False, True, True], [1, 0], [2, 0, 1, 1]]
        case "per_layer_config":
            return [{"1": {"rms_norm_eps": 0.5}}, {"0": {"sliding_window": 3}}, {"2": {"intermediate_size": 56}}]
        case "quantization_config":
            return [{"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}]
        case "short_factor" | "long_factor":
            return [numbers]
        case "mrope_section":
            return [[4, 2, 2]]
        case _:
            return []


def all_keys(case: Case, config: dict[str, Any]) -> list[str]:
    """Keys of the file, of transformers' class, and of other spellings and families."""
    made = CONFIG_MAPPING[case.family](**{key: value for key, value in case.settings.items()})
    fields = [name for name in type(made).__dataclass_fields__ if not name.startswith("_")]
    keys = [*config, *made.to_dict(), *made.to_diff_dict(), *fields, *type(made).attribute_map, *OTHER_KEYS]
    return [key for key in dict.fromkeys(keys) if key not in NOT_CHANGED]


def changes(case: Case, config: dict[str, Any], legacy: bool = False) -> Iterator[Change]:
    """Every change of one saved model: all keys of the main one of a family, those that distinguish the others."""
    made = CONFIG_MAPPING[case.family](**case.settings).to_dict()
    size = made.get("head_dim") or case.settings["hidden_size"] // case.settings["num_attention_heads"]
    keys = all_keys(case, config)
    if legacy:
        keys = [key for key in keys if key in LEGACY]
    elif case.name != MAIN[case.family]:
        own = {**case.settings}.keys() - {"pad_token_id"}
        plain = Case(case.family, MAIN[case.family]).settings
        keys = [key for key in keys if key in own and case.settings[key] != plain.get(key)]
    for key in keys:
        yield from (Change((key,), value) for value in values(key, config.get(key, made.get(key)), size))
        if key in config:
            yield Change((key,), GONE)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(name), dict):
            yield from _nested((name,), config[name], size)


def _nested(path: PathOfKey, table: dict[str, Any], size: int) -> Iterator[Change]:
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    for key, value in inner.items():
        yield from _nested((*path, key), value, size)
        yield from (Change((*path, key), other) for other in (GONE, None, {}, 3))
    for key in (*table, *(key for key in SUBKEYS if key not in table)):
        if key not in inner:
            other = values(key, table[key], size) if key in table else [*ABSENT, *special_values(key, size)]
            yield from (Change((*path, key), value) for value in other)
            if key in table:
                yield Change((*path, key), GONE)


def models(family: str) -> list[tuple[Case, bool]]:
    """The models of a family, and whether one is spelled as transformers 4 did."""
    cases = [case for case in ALL if case.family == family]
    legacy = [case for case in cases if case.name in SPELLED_BOTH_WAYS]
    return [(case, False) for case in cases] + [(case, True) for case in legacy]


def results(family: str, root: Path, key: str = "", every: int = 1) -> list[Result]:
    """What comes of the changes in a family. A model that cannot be imported as it is counts as one fault.

    Args:
        key: only of this key (the last of nested ones).
        every: one of so many changes.
    """
    found: list[Result] = []
    seen: list[dict[str, Any]] = []  # subkeys are changed once where models differ elsewhere
    for case, legacy in models(family):
        folder = Folder(case, root / family, legacy)
        found.append(folder.result(Change((), GONE)))
        if found[-1].faulty:
            continue
        tables = {name: folder.config.get(name) for name in ("rope_parameters", "rope_scaling")}
        chosen = [change for change in changes(case, folder.config, legacy) if len(change.key) < 2 or tables not in seen]
        seen.append(tables)
        for number, change in enumerate(chosen):
            if key in ("", change.key[-1]) and number % every == 0:
                found.append(folder.result(change))
    return with_acting_keys(found)


def quiet() -> None:
    """transformers says at length what it thinks of a wrong value."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def table(found: list[Result], by_key: bool = False) -> str:
    """How many changes of how many keys, and how many came to each outcome; a row for each family, or for each key of it."""
    lines = ["| family | keys | changes | " + " | ".join(OUTCOMES) + " | faults |", "|---|---|" + "---:|" * (len(OUTCOMES) + 2)]
    for family in dict.fromkeys(result.case.family for result in found):
        of_family = [result for result in found if result.case.family == family]
        keys = [*dict.fromkeys(".".join(result.change.key) for result in of_family if result.change.key)]
        if not by_key:
            lines.append(_row(family, str(len(keys)), of_family))
            continue
        lines += [_row(family, key, [r for r in of_family if ".".join(r.change.key) == key]) for key in keys]
    return "\n".join(lines)


def _row(family: str, keys: str, found: list[Result]) -> str:
    counts = Counter("fault" if result.faulty else result.outcome for result in found)
    cells = [family, keys, str(counts.total()), *(str(counts[name] or "") for name in (*OUTCOMES, "fault"))]
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    """0: no fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.families.keys", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", action="append", choices=MAIN, help="default all")
    parser.add_argument("--key", default="", help="this key alone")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one of N changes")
    parser.add_argument("--by-key", action="store_true", help="a row for every key")
    parser.add_argument("--faults", action="store_true", help="print the faults, not the table")
    chosen = parser.parse_args(arguments)
    quiet()
    found = []
    with tempfile.TemporaryDirectory() as root:
        for family in chosen.family or MAIN:
            found += results(family, Path(root), chosen.key, chosen.every)
    faults = [result for result in found if result.faulty]
    print("\n".join(map(str, faults)) if chosen.faults else table(found, chosen.by_key))
    print(f"\n{len(found)} changes, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
