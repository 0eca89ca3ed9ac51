"""Options and fixtures; the whole package runs under jaxtyping's shape checks."""

import os

# Parallel test workers and the processes they start share the processors. OpenMP reads this when
# torch is imported.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

from jaxtyping import config as shape_checks
from jaxtyping import install_import_hook

install_import_hook("manifold_hc", "beartype.beartype")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--test-data", type=Path, default=None, help="folder with real text")
    parser.addoption(
        "--every-kernel", action="store_true", help="compile GPU kernels at every n: some minutes"
    )
    parser.addoption(
        "--wide", action="store_true", help="share runs among four processes too: some minutes"
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help="run the fewest cases that cover every value",
    )
    parser.addoption(
        "--cpu-library",
        type=Path,
        help="a wheel's library of CPU kernels, in place of the built one",
    )


def pytest_configure(config):
    if file := config.getoption("--cpu-library"):
        from manifold_hc.kernels.cpu import prebuilt
        from manifold_hc.kernels.cpu.build import library

        prebuilt.find = lambda: file
        if library()._name != str(file):
            raise pytest.UsageError(f"--cpu-library={file} does not load")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        chosen = fewest_cases([i for i in items if not i.get_closest_marker("slow")])
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    if config.getoption("--wide"):
        return
    for item in items:
        if item.get_closest_marker("wide"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --wide"))


def fewest_cases(items):
    """The cases of every parametrised test that have a value of a parameter for the first time."""
    seen, chosen = set(), []
    for item in items:
        test = item.nodeid.partition("[")[0]
        params = item.callspec.params if hasattr(item, "callspec") else {"": None}
        values = {(test, name, repr(value)) for name, value in params.items()}
        if not values <= seen:
            chosen.append(item)
            seen |= values
    return chosen


@pytest.fixture
def test_data(request) -> Path:
    folder = request.config.getoption("--test-data")
    if folder is None:
        pytest.skip("needs the test data: pytest --test-data=PATH")
    return folder


@pytest.fixture
def unchecked():
    """Disable jaxtyping's checks, so that invalid arguments reach the package's own errors."""
    shape_checks.update("jaxtyping_disable", True)
    yield
    shape_checks.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def text_file(tmp_path) -> Path:
    """A random text over a small vocabulary of made-up words."""
    path = tmp_path / "text.txt"
    path.write_text(generated_text(40_000))
    return path


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A function from (vocabulary size, special tokens) to the path of a trained tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def train(size=300, special=("<|endoftext|>",)):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(special),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator([generated_text(20_000)], trainer)
        file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
        tokenizer.save(str(file))
        return file

    return train


def generated_text(length: int, seed: int = 0) -> str:
    import random

    draw = random.Random(seed)
    words = [
        "".join(draw.choice("aeioulnrst") for _ in range(draw.randint(2, 7))) for _ in range(60)
    ]
    text = ""
    while len(text) < length:
        text += " ".join(draw.choices(words, k=draw.randint(3, 9))) + ".\n"
    return text[:length]
