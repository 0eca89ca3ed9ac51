"""Plain PyTorch models: described by the names of their blocks and branches."""

import copy
import doctest

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module

import manifold_hc as mhc
from manifold_hc.errors import CheckpointError, ConfigError, ShapeError
from manifold_hc.interop import retrofit
from tests.interop.tiny_models import relative_error, scatter


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.c_attn = nn.Linear(channels, 3 * channels)
        self.c_proj = nn.Linear(channels, channels)

    def forward(self, x):
        q, k, v = self.c_attn(x).chunk(3, -1)
        return self.c_proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class Block(nn.Module):
    """nanoGPT's block."""

    def __init__(self, channels):
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels)
        self.attn = Attention(channels)
        self.ln_2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 64), nn.GELU(), nn.Linear(64, channels))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = nn.ModuleList(Block(16) for _ in range(3))
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(32, 16), "h": blocks, "ln_f": nn.LayerNorm(16)}
        )
        self.lm_head = nn.Linear(16, 32, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, ids):
        x = self.transformer.wte(ids)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


IDS = torch.arange(14).reshape(2, 7)
NANO = {"blocks": "transformer.h", "sublayers": [("ln_1", "attn"), ("ln_2", "mlp")]}


def nano(seed=0):
    torch.manual_seed(seed)
    return GPT()


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, batch_first=True)
    return nn.TransformerEncoder(layer, 3, nn.LayerNorm(16), enable_nested_tensor=False).eval()


def attend(block, u, src_mask=None, src_key_padding_mask=None, is_causal=False):
    return block._sa_block(block.norm1(u), src_mask, src_key_padding_mask, is_causal)


ENCODER = {"blocks": "layers", "sublayers": [attend, ("norm2", "_ff_block")]}


@pytest.mark.parametrize("kind", ["mhc", "hc", "residual"])
def test_nanogpt_starts_as_before_and_trains(kind):
    model = nano()
    wanted = model(IDS)
    assert retrofit.convert(model, kind, **NANO) is model
    assert relative_error(model(IDS), wanted) <= 1e-5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_nanogpt_is_saved_and_loaded(tmp_path):
    pytest.importorskip("safetensors")
    plain = nano()
    model = scatter(retrofit.convert(copy.deepcopy(plain), **NANO), only="hc_stack")
    wanted = model(IDS)
    other = retrofit.convert(nano(seed=1), **NANO)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), wanted)

    retrofit.save_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match="GPT must be converted first"):
        retrofit.load_adapter(copy.deepcopy(plain), tmp_path)
    again = retrofit.load_adapter(retrofit.convert(plain, **NANO), tmp_path)
    assert torch.equal(again(IDS), wanted)
    with pytest.raises(CheckpointError, match=r"belongs to the base model 'GPT' \(fingerprint"):
        retrofit.load_adapter(retrofit.convert(nano(seed=1), **NANO), tmp_path)


def test_a_changed_buffer_of_the_base_model_is_found(tmp_path):
    pytest.importorskip("safetensors")
    plain = nano()
    plain.transformer.h[1].register_buffer("offset", torch.zeros(3))
    plain.transformer.h[1].register_buffer("cache", torch.zeros(3), persistent=False)
    model = retrofit.convert(plain, **NANO)
    model.transformer.h[1].cache += 1
    retrofit.save_adapter(model, tmp_path)
    model.transformer.h[1].offset[2] = 1e-6
    with pytest.raises(CheckpointError, match="must be unchanged since convert"):
        retrofit.save_adapter(model, tmp_path)


def test_sharded_base_weights_are_refused():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nano()
        mesh = init_device_mesh("cpu", (1,))
        distribute_module(model.transformer.h[0].mlp, mesh)
        with pytest.raises(ConfigError, match=r"h.0.mlp.0.weight is a DTensor; convert, save and"):
            retrofit.convert(model, **NANO)
        assert type(model.transformer.h[0]) is Block
    finally:
        torch.distributed.destroy_process_group()


def test_an_example_checks_the_description():
    model = nano()
    before = dict(model.named_modules())
    wrong = [("ln_2", "mlp"), ("ln_1", "attn")]
    with pytest.raises(ConfigError, match=r"they differ by \d.*describe every norm"):
        retrofit.convert(model, blocks="transformer.h", sublayers=wrong, example=IDS)
    assert dict(model.named_modules()) == before
    assert type(model.transformer.h[0]) is Block
    assert vars(model.transformer.h[0]).keys() == vars(Block(16)).keys()
    assert model.training
    with pytest.raises(ConfigError, match=r"'ln_3'"):
        retrofit.convert(model, blocks="transformer.h", sublayers=["ln_3"], example=IDS)
    for example in (IDS, (IDS,), {"ids": IDS}):
        retrofit.convert(nano(), **NANO, example=example, trainable="connections")


class Extra(Block):
    """A block with a parameter and a module that its forward may not use."""

    def __init__(self, channels):
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(channels))
        self.side = nn.Sequential(nn.Dropout(), nn.Linear(channels, channels))


@pytest.mark.parametrize("example", [None, IDS])
@pytest.mark.parametrize(
    ("block", "sublayers", "missing"),
    [
        (Block, [("ln_1", "attn")], "ln_2, mlp.0, mlp.2 is in none"),
        (Block, ["attn", ("ln_2", "mlp")], "ln_1 is in none"),
        (Block, [("ln_1", "attn.c_proj"), ("ln_2", "mlp")], "attn.c_attn is in none"),
        (Extra, NANO["sublayers"], "gain, side.1 is in none"),
    ],
)
def test_a_description_without_a_branch_is_refused(block, sublayers, missing, example):
    model = nano()
    model.transformer.h[1] = block(16)
    with pytest.raises(ConfigError, match=rf"of transformer.h.\d must belong .* but {missing}"):
        retrofit.convert(model, blocks="transformer.h", sublayers=sublayers, example=example)
    assert not any("hc_stack" in name for name, _ in model.named_modules())


def test_parameters_of_a_scale_a_method_or_a_function_are_described():
    class Scaled(Extra):
        def forward(self, x):
            x = x + self.gain * self.attn(self.ln_1(x))
            return x + self.tail(self.ln_2(x))

        def tail(self, x):
            return self.mlp(x) + self.side(x)

    for last in (("ln_2", "tail"), lambda block, u: block.tail(block.ln_2(u))):
        model = nano().eval()
        for index in range(3):
            model.transformer.h[index] = Scaled(16).eval()
        wanted = model(IDS)
        branches = [retrofit.Sublayer(("ln_1", "attn"), scale="gain"), last]
        retrofit.convert(model, blocks="transformer.h", sublayers=branches)
        assert relative_error(model(IDS), wanted) <= 1e-5


class Order(nn.Module):
    """Blocks in an order that can be changed."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        self.h = nn.ModuleList(Block(16) for _ in range(3))
        self.order = order

    def forward(self, x):
        for index in self.order:
            x = self.h[index](x)
        return x


@pytest.mark.parametrize(
    ("order", "length", "message"),
    [
        ([2, 1, 0], 7, "not the first must get the streams"),
        ([2, 1, 0], 4, "not the first must get the streams"),  # as many tokens as streams
        ([1, 2], 7, "not the first must get the streams"),
        ([0, 1, 0, 2], 7, "the first block must get the embedding"),
        ([0, 1, 2, 1], 7, "not the first must get the streams"),
        ([0, 1, 2, 1], 4, "not the first must get the streams"),
    ],
)
def test_blocks_in_another_order_are_refused(order, length, message):
    model = retrofit.convert(Order(order), blocks="h", sublayers=NANO["sublayers"])
    with pytest.raises(ConfigError, match=f"blocks of a converted model must run .*{message}"):
        model(torch.randn(2, length, 16))


def test_a_middle_block_may_be_skipped_or_repeated():
    """The streams pass on, so that the function stays that of the model before."""
    for order in ([0, 2], [0, 1, 1, 2]):
        model = Order(order)
        x = torch.randn(2, 7, 16)
        wanted = model(x)
        retrofit.convert(model, blocks="h", sublayers=NANO["sublayers"])
        assert relative_error(model(x), wanted) <= 1e-5


def test_an_example_finds_a_last_block_that_is_skipped():
    with pytest.raises(
        ConfigError, match=r"shape is \[2, 7, 16\] before and \[2, 7, 4, 16\] after"
    ):
        retrofit.convert(
            Order([0, 1]), blocks="h", sublayers=NANO["sublayers"], example=torch.randn(2, 7, 16)
        )


def test_a_transformer_encoder_keeps_its_masks():
    model = encoder()
    x = torch.randn(2, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    options = [
        {},
        {"src_key_padding_mask": padding},
        {"mask": causal, "is_causal": True},
        {"mask": causal.isinf(), "src_key_padding_mask": padding},
    ]
    wanted = [model(x, **given).detach() for given in options]
    retrofit.convert(model, **ENCODER)
    for given, result in zip(options, wanted, strict=True):
        assert relative_error(model(x, **given), result) <= 1e-5
    assert model.layers[1](torch.zeros(2, 5, 4, 16)).shape == (2, 5, 4, 16)


def test_a_single_name_and_a_sequential():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8))

        def forward(self, x):
            return x + self.f(x)

    model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(*(Layer() for _ in range(4))))
    x = torch.randn(5, 3)
    wanted = model(x)
    retrofit.convert(model, streams=3, blocks="1", sublayers=["f"])
    assert relative_error(model(x), wanted) <= 1e-5


def test_arguments_that_no_branch_takes_are_an_error():
    model = encoder()
    description = [("norm1", "self_attn"), ("norm2", "_ff_block")]
    retrofit.convert(model, blocks="layers", sublayers=description)
    with pytest.raises(ShapeError, match=r"no described branch takes is_causal"):
        model.layers[0](torch.zeros(1, 5, 16), is_causal=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"GPT is not a model of transformers: describe its blocks"),
        ({"blocks": "transformer.g", "sublayers": ["mlp"]}, r"blocks must be a path in the model"),
        ({"blocks": "transformer.wte", "sublayers": ["mlp"]}, r"'transformer.wte' is a Embedding"),
        ({"blocks": "transformer.h"}, r"sublayers must be a list with one entry per"),
        ({**NANO, "sublayers": "mlp"}, r"sublayers must be a list with one entry per"),
        ({**NANO, "sublayers": [3]}, r"must be a tuple of module names or a function .* is 3"),
        ({**NANO, "sublayers": ["mpl"]}, r"transformer.h.0 must have the module 'mpl'"),
        (
            {**NANO, "sublayers": [retrofit.Sublayer(("attn",), arguments_to="atn")]},
            r"arguments_to must be one of attn but is 'atn'",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_descriptions(options, message):
    model = nano()
    with pytest.raises(ConfigError, match=message):
        retrofit.convert(model, **options)
    assert type(model.transformer.h[0]) is Block


def test_channels_without_a_norm():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.f(x)

    model = nn.Sequential(*(Layer() for _ in range(2)))
    x = torch.randn(5, 8)
    wanted = model(x)
    outer = nn.ModuleList([model])
    with pytest.raises(ConfigError, match="channels must be given, because Layer has no norm"):
        retrofit.convert(outer, blocks="0", sublayers=["f"])
    retrofit.convert(outer, blocks="0", sublayers=["f"], channels=8)
    assert relative_error(model(x), wanted) <= 1e-5


def test_static_maps_of_a_plain_model():
    model = nano()
    wanted = model(IDS)
    config = mhc.ConnectionConfig(dynamic=False, streams=2)
    assert relative_error(retrofit.convert(model, config=config, **NANO)(IDS), wanted) <= 1e-5


def test_the_example_of_the_docstring():
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(retrofit.convert, "convert", globs={"retrofit": retrofit})
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
    assert len(example.examples) > 5
