"""Checkpoints in a library's layout agree with that library's code, whose changes are found."""

import warnings
from dataclasses import replace
from importlib import metadata

import pytest
from safetensors.torch import save_file

from manifold_hc.errors import MissingExtraError
from manifold_hc.interop.layouts import LAYOUTS, open_checkpoint
from manifold_hc.verify import compare
from manifold_hc.verify.references import reference_of
from tests.verify.conftest import build

pytestmark = pytest.mark.usefixtures("unchecked")


def has(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


needs_tile_kernels = pytest.mark.skipif(not has("tile-kernels"), reason="needs tile-kernels")


@pytest.fixture
def saved(tmp_path):
    def save(layout, **config):
        """A checkpoint of random connections in a layout."""
        config = {"exit": LAYOUTS[layout].config(4).exit or "mean", **config}
        wanted = replace(LAYOUTS[layout].config(4), **config)
        stack = build(**{name: getattr(wanted, name) for name in wanted.__dataclass_fields__})
        file = tmp_path / f"{layout}.safetensors"
        save_file(LAYOUTS[layout].from_native(dict(stack.state_dict())), file)
        return open_checkpoint(file, layout, config)

    return save


def report(checkpoint):
    with warnings.catch_warnings(action="ignore"):
        return compare(checkpoint.stack(), reference_of(checkpoint, tokens=5))


@pytest.mark.parametrize(
    ("layout", "config", "name", "tensors"),
    [
        ("transformers", {}, "transformers", "post u new h"),
        ("deepseek_v4", {}, "transformers", "post u new h"),
        (
            "transformers",
            {"numerics": "glm5", "norm_eps": 1e-5, "exit": "mean"},
            "glm5",
            "post u new h",
        ),
        (
            "deepseek_v4",
            {"numerics": "deepseek_v41", "exit": "pre", "single_pass": True},
            "transformers",
            "post new",
        ),
        pytest.param(
            "tile_kernels", {}, "tile-kernels", "pre post u new h", marks=needs_tile_kernels
        ),
    ],
)
def test_a_checkpoint_agrees_with_its_library(saved, layout, config, name, tensors):
    checkpoint = saved(layout, **config)
    found = report(checkpoint)
    assert name in reference_of(checkpoint).name
    assert found.ok, found.diagnosis
    assert found.precision == "float64"
    assert list(dict.fromkeys(one.tensor for one in found.compared)) == tensors.split()
    assert len([one for one in found.compared if one.tensor == "new"]) == 4


@pytest.mark.slow
def test_a_checkpoint_agrees_with_interpreted_kernels(saved):
    pytest.importorskip("liger_kernel")
    found = report(saved("liger"))
    assert found.ok, found.diagnosis
    assert found.precision == "float32"
    assert [one.tensor for one in found.compared[:5]] == ["pre", "post", "res", "u", "new"]


def test_our_own_layout_is_compared_in_float32(saved):
    found = report(saved("manifold"))
    assert found.ok
    assert found.precision == "float32"
    assert 0 < max(one.error for one in found.compared) < 1e-5


def test_another_norm_of_the_library_is_named(saved, monkeypatch):
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    def outside(self, x):
        return x / (x.float().square().mean(-1, keepdim=True).sqrt() + self.eps).to(x.dtype)

    monkeypatch.setattr(modeling.DeepseekV4UnweightedRMSNorm, "forward", outside)
    found = report(saved("transformers"))
    assert found.diagnosis.sentences == [
        "the epsilon of the norm is outside the root; fits all 4 sublayers and the exit"
    ]


def test_another_head_of_the_library_is_named(saved, monkeypatch):
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    monkeypatch.setattr(
        modeling.DeepseekV4HyperHead, "forward", lambda self, x: self.hc_base.sum() * 0 + x.mean(2)
    )
    found = report(saved("transformers"))
    assert found.diagnosis.sentences[0].startswith("the exit is the mean of the streams; fits")
    assert [one.tensor for one in found.differing] == ["h"]


def test_both_halves_of_a_layer_are_the_librarys(saved, monkeypatch):
    """A write of the feed-forward half alone in the other direction differs in odd sublayers."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    own = modeling.DeepseekV4DecoderLayer.forward

    def forward(layer, x, **options):
        half = layer.ffn_hc

        def flipped(streams):
            post, comb, u = half(streams)
            return post, comb.mT, u

        layer.ffn_hc = flipped
        return own.__wrapped__(layer, x, **options)

    monkeypatch.setattr(modeling.DeepseekV4DecoderLayer, "forward", forward)
    found = report(saved("transformers"))
    assert sorted({one.index for one in found.differing}) == [1, 3]
    assert found.diagnosis.sentences[-1].startswith("res is mixed in the other direction")


def test_a_layout_without_a_package_asks_for_a_recording(saved):
    with pytest.raises(MissingExtraError, match="--recorded FILE"):
        reference_of(saved("megatron"))


def test_a_package_that_is_missing_is_named(saved, monkeypatch):
    from manifold_hc.verify.references import tile_kernels

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    tile_kernels._code.cache_clear()
    monkeypatch.setattr(tile_kernels.metadata, "distribution", missing)
    with pytest.raises(MissingExtraError, match="pip install --no-deps tile-kernels"):
        report(saved("tile_kernels"))


def test_tensors_are_those_of_the_files(saved, tmp_path):
    """A file that we read wrongly must not agree: the library gets its own tensors."""
    checkpoint = saved("transformers")
    checkpoint.native["connections.2.maps.phi"][2, 3] += 1e-3
    found = report(checkpoint)
    assert {one.index for one in found.differing} == {2}
