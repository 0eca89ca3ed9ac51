"""Random configurations give a plan or an error of one line, never a traceback or a hang."""

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout, suppress

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from manifold_hc.cli import keys, main
from manifold_hc.errors import RunFolderError
from manifold_hc.training import RunConfig, RunFolder

pytestmark = pytest.mark.usefixtures("unchecked")

EXAMPLES = int(os.environ.get("MHC_FUZZ_EXAMPLES", "25"))
"""Number of examples; for more: MHC_FUZZ_EXAMPLES=2000 pytest tests/cli/test_fuzz.py."""

quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

LEAVES = [key for key, _, _ in keys.describe(RunConfig())]
SECTIONS = sorted({key.rpartition(".")[0] for key in LEAVES})

INTEGERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**k + d for k in (10, 16, 31, 32, 53, 63, 64, 200) for d in (-1, 0, 1)]),
    st.just(10**400),
    st.just(-(10**400)),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", "null", "true", "nan", "inf", "-inf", "1e999", "1e-320", "auto", "none", "mhc", "hc",
         "residual", "deepseek_v4", "permutation", "kronecker", "exact", "identity", "cosine",
         "bfloat16", "DualPipeV", "pre,post,res", "1,2", ",", "a\0b", "\ud800", "x\udcff", "é", "="]
    ),
    st.text(st.characters(), max_size=6),
)  # fmt: skip
VALUES = st.one_of(
    INTEGERS, TEXTS, st.booleans(), st.none(), st.floats(allow_nan=True, allow_infinity=True)
)


def answer(*arguments):
    """Exit status, standard output and standard error of the command line."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    return status, out.getvalue(), err.getvalue()


def require_an_answer(found):
    status, out, err = found
    assert status in (0, 2)
    if status == 0:
        assert err == ""
        return
    assert out == ""
    assert err.startswith("mhc: error: ")
    assert err.count("\n") == 1
    assert err.isprintable() or err[:-1].isprintable()
    assert len(err) < 2000


PAIRS = st.lists(
    st.builds(
        lambda key, value: f"{key}={value}",
        st.one_of(st.sampled_from(LEAVES), st.sampled_from(SECTIONS), TEXTS),
        st.one_of(INTEGERS.map(str), TEXTS),
    ).filter(lambda pair: not pair.startswith("-")),
    max_size=6,
)


@quick
@given(pairs=PAIRS, name=st.sampled_from(["tiny", "tiny-moe"]))
@example(pairs=["model.channels=9223372036854775808"], name="tiny")
@example(pairs=["data.sequence=9223372036854775808"], name="tiny")
@example(pairs=["model.blocks=100000000"], name="tiny")
@example(pairs=["model.experts.routed=2147483647", "model.experts.width=2147483647"], name="tiny")
@example(pairs=["connection.streams=100000"], name="tiny")
@example(pairs=["optimizer.warmup=" + "9" * 400], name="tiny")
@example(pairs=["model.experts.routed=-" + "9" * 400], name="tiny")
@example(pairs=["model.init_std=" + "9" * 400], name="tiny")
@example(pairs=["data.paths=x\udcff"], name="tiny")
@example(pairs=["data.text_key=\ud800"], name="tiny")
@example(pairs=["data.tokenizer=a\0b"], name="tiny")
@example(pairs=["model.vocabulary=\ud800"], name="tiny")
@example(pairs=["\ud800=1"], name="tiny")
def test_keys(pairs, name):
    require_an_answer(answer("train", "--dry-run", "--preset", name, *pairs))


def whole():
    """A config.json as a run writes it, as a JSON tree."""
    import msgspec

    return json.loads(msgspec.json.encode(RunConfig()))


def damaged(changes):
    """The default configuration with the leaves, sections or unknown keys of `changes`."""
    tree = whole()
    for key, value in changes:
        *sections, name = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {}) if isinstance(branch, dict) else {}
        if isinstance(branch, dict):
            branch[name] = value
    return tree


NESTED = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
CHANGES = st.lists(
    st.tuples(st.one_of(st.sampled_from(LEAVES), st.sampled_from(SECTIONS), TEXTS), NESTED),
    min_size=1,
    max_size=4,
)


@quick
@given(changes=CHANGES)
@example(changes=[("foreign", "\ud800")])
@example(changes=[("\ud800", 1)])
@example(changes=[("data.\ud800", 1)])
@example(changes=[("model.channels", 10**400)])
@example(changes=[("model.channels", 2**63)])
@example(changes=[("model.norm_eps", 2**2000)])
@example(changes=[("data.boundary", "\ud800")])
@example(changes=[("data.weights", [1e400])])
def test_keys_of_a_file(tmp_path_factory, changes):
    file = tmp_path_factory.mktemp("fuzz") / "config.json"
    file.write_text(json.dumps(damaged(changes)))
    require_an_answer(answer("train", "--dry-run", "--config", file))
    with suppress(RunFolderError):
        RunFolder(file.parent).config()


@quick
@given(
    cut=st.integers(0, 3000),
    put=st.one_of(st.binary(max_size=6), st.sampled_from([b"\0", b"\xff", b"\\ud800", b"NaN"])),
    drop=st.integers(0, 40),
)
def test_bytes_of_a_file(tmp_path_factory, cut, put, drop):
    content = json.dumps(whole()).encode()
    cut %= len(content)
    file = tmp_path_factory.mktemp("fuzz") / "config.json"
    file.write_bytes(content[:cut] + put + content[cut + drop :])
    require_an_answer(answer("train", "--dry-run", "--config", file))


def test_a_deeply_nested_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"model":' * 100_000)
    require_an_answer(answer("train", "--dry-run", "--config", file))
    with pytest.raises(RunFolderError, match="is damaged"):
        RunFolder(tmp_path).config()
