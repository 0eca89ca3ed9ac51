"""Converted models of transformers as a whole: their configuration, class, saving and loading."""

import copy
import functools
from typing import Any, ClassVar

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from manifold_hc.errors import CheckpointError
from manifold_hc.interop.retrofit.blocks import NAME, attach, new_stack, stream_blocks
from manifold_hc.interop.retrofit.conversion import describe
from manifold_hc.interop.retrofit.record import Retrofit

MODEL_TYPE = "manifold_hc_retrofit"
"""model_type in the configuration of a saved model; transformers alone does not know it."""

GUARD = "a retrofit: load this folder with manifold_hc.interop.retrofit.load"
"""Value of vocab_size in that file: no class of the base family accepts it, and its error shows it.
"""

CONVERTED = " (convert with manifold_hc.interop.retrofit first)"
"""Suffix of `name_or_path`: AutoPeftModel then raises an error and loads no residual model."""

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
"""Auto classes of transformers that load converted models."""


class SavedConfig(PreTrainedConfig):
    """Reader of the configuration file of a converted model."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of the base family, with the record of the conversion."""
        saved: Any = config_dict.get("base_config")
        model_type: Any = config_dict.get("base_model_type")
        if not isinstance(saved, dict) or model_type not in CONFIG_MAPPING:
            raise CheckpointError(
                f"load: config.json of a {MODEL_TYPE} must hold base_config and a base_model_type "
                f"that transformers knows but the type is {model_type!r}; save the model again, or "
                "install the version of transformers that it was saved with"
            )
        family: Any = CONFIG_MAPPING[model_type]
        register_family(family)
        return converted_config(family).from_dict(config_dict, **kwargs)


class ConvertedConfig:
    """Configuration of a base family that remembers the conversion in `hc_retrofit`."""

    original_class: ClassVar[type[PreTrainedConfig]]
    hc_retrofit: dict[str, Any]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a saved file, or the flat values of `to_dict`."""
        flat = dict(config_dict)
        if flat.get("model_type") == MODEL_TYPE:
            flat = {
                **flat["base_config"],
                "architectures": flat.get("architectures"),
                "hc_retrofit": {key: flat.get(key) for key in ("connection", "base")},
            }
            Retrofit.from_json(flat["hc_retrofit"], "config.json")
        elif "hc_retrofit" not in flat:
            raise CheckpointError(
                "load: the model must be a saved retrofit but is a plain "
                f"{flat.get('model_type')}; load it with its own class and convert it"
            )
        return super().from_dict(flat, **kwargs)  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the values of the file: the base family's are nested, under a type of their own.

        A class of the base family, which would load the model without its connections, finds
        neither its model_type nor its values, but `GUARD`.
        """
        base = super().to_diff_dict()  # type: ignore[misc]
        record = base.pop("hc_retrofit")
        return {
            "model_type": MODEL_TYPE,
            "architectures": base.pop("architectures", None),
            "vocab_size": GUARD,
            **record,
            "base_model_type": base.pop("model_type"),
            "base_config": base,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the base family's class: this class is made at run time."""
        return _empty_config, (self.original_class,), dict(vars(self))


class ConvertedModel:
    """Model of a base family whose blocks are converted when it is built."""

    original_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the base model and convert it, with the initial values of the connections."""
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        model.hc_retrofit = Retrofit.from_json(config.hc_retrofit, "config.json")
        if stream_blocks(model):  # of a base model that is built through an auto class
            return
        blocks, sublayers, channels = describe(model, None, None, None)
        connection = model.hc_retrofit.connection
        stack = new_stack(list(blocks.values()), len(sublayers), channels, connection)
        attach(list(blocks.values()), sublayers, stack)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model; its tensors must be exactly those of the model.

        Raises:
            CheckpointError: For tensors that are missing, left over, or of another shape.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        lenient = kwargs.pop("ignore_mismatched_sizes", False)
        model, report = super().from_pretrained(  # type: ignore[misc]
            path, *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        _require_class(str(path), model, report)
        require_exact(str(path), report, lenient)
        return (model, report) if wants_report else model

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the base family's class: this class is made at run time."""
        return _empty_model, (self.original_class,), dict(vars(self))


def _require_class(path: str, model: Any, report: dict[str, Any]) -> None:
    """Raise CheckpointError if tensors do not fit because the folder holds another class."""
    saved = (model.config.architectures or [""])[0]
    own = type(model).__name__
    if saved in ("", own) or not (report["missing_keys"] or report["unexpected_keys"]):
        return
    auto = next((f"{name} or " for name in AUTO_CLASSES if saved in _made_by(name, model)), "")
    raise CheckpointError(
        f"load: {path} holds a {saved} but is loaded as a {own}, which has other tensors; load it "
        f"with {auto}manifold_hc.interop.retrofit.load"
    )


def _made_by(auto_class: str, model: Any) -> tuple[str, ...]:
    """Return the names of the classes that an auto class has for a model's configuration."""
    auto: Any = getattr(transformers, auto_class)
    if type(model.config) not in auto._model_mapping:
        return ()
    made = auto._model_mapping[type(model.config)]
    return tuple(each.__name__ for each in (made if isinstance(made, tuple) else (made,)))


def require_exact(path: str, report: dict[str, Any], lenient: bool = False) -> None:
    """Raise CheckpointError, naming every tensor, unless a checkpoint fits.

    lenient: True to accept shapes that differ outside of the connections.
    """
    misshaped = [
        f"{name} is {list(saved)} and not {list(wanted)}"
        for name, saved, wanted in report["mismatched_keys"]
        if not lenient or f".{NAME}." in name
    ]
    faults = {
        "missing": sorted(report["missing_keys"]),
        "left over": sorted(report["unexpected_keys"]),
        "of another shape": sorted(misshaped),
    }
    found = [f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names]
    if found:
        raise CheckpointError(
            f"load: {path} must have exactly the tensors of the converted model but has tensors "
            f"{'; '.join(found)}; save the model again"
        )


@functools.cache
def converted_config(family: Any) -> Any:
    """Return the configuration class of converted models of a family, given the family's class.

    Its name differs from the family's, because the auto classes look models up by that name.
    """
    body = {"__module__": __name__, "original_class": family}
    return type(f"Retrofit{family.__name__}", (ConvertedConfig, family), body)


@functools.cache
def converted_model(original: Any) -> Any:
    """Return the class of converted models, given the class of the model; it keeps the name."""
    config_class: Any = original.config_class
    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "original_class": original,
        "config_class": converted_config(config_class),
    }
    return type(original.__name__, (ConvertedModel, original), body)


def adopt_pretrained(model: Any, record: Retrofit) -> None:
    """Give a model in memory, whose blocks are converted, the class that saves and loads it.

    The configuration is replaced by a copy: other models may share it. `name_or_path` gets a
    suffix, because PEFT saves it as the place of the model that its adapter fits.
    """
    plain, original = model.config, model.__class__
    config = copy.deepcopy(plain)
    config.__class__ = converted_config(plain.__class__)
    config.hc_retrofit = record.to_json()
    for module in model.modules():
        for name, value in vars(module).items():
            if value is plain:
                setattr(module, name, config)
    model.name_or_path = f"{record.base.name}{CONVERTED}"
    register()
    register_family(plain.__class__)
    model.__class__ = converted_model(original)


def register() -> None:
    """Register the reader of the configuration file with `AutoConfig`."""
    AutoConfig.register(MODEL_TYPE, SavedConfig, exist_ok=True)


def register_family(family: Any) -> None:
    """Register the converted models of a family with every auto class that has the family."""
    for name in AUTO_CLASSES:
        auto: Any = getattr(transformers, name)
        if family not in auto._model_mapping:
            continue
        architectures = auto._model_mapping[family]
        if isinstance(architectures, list | tuple):
            made: Any = tuple(converted_model(each) for each in architectures)
        else:
            made = converted_model(architectures)
        auto._model_mapping.register(converted_config(family), made, exist_ok=True)


def _empty_model(original: Any) -> Any:
    kind = converted_model(original)
    return kind.__new__(kind)


def _empty_config(original: Any) -> Any:
    kind = converted_config(original)
    return kind.__new__(kind)
