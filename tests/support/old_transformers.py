"""Models made and run by another version of transformers, in a process of its own.

The process reads one JSON request a line and answers each with a line: ``make`` builds a model of the zoo and
saves it with a tokenizer, ``run`` loads a folder through the Auto classes and saves what the model computes.
It finds a folder of ``pip install --target`` ahead of this environment's packages, which bring torch and the
rest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn

REQUIREMENTS = ("transformers==4.57.*", "huggingface-hub<1", "tokenizers>=0.22,<0.23")
VALUE = "value"  # of the model: logits, or hidden states where there are none
TEXT, TOKENS = "a b c d e f g a b", [0, 1, 2, 3, 4, 5, 6, 0, 1]
AUTO = (
    *("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", "AutoModelForMaskedLM"),
    *("AutoModelForPreTraining", "AutoModelForSequenceClassification", "AutoModelForImageClassification"),
    *("AutoModelForCTC", "AutoModelForImageTextToText", "AutoModel"),
)


def install(folder: Path) -> str:
    """Puts the other version into a folder. Returns what pip said if it could not."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*pip, *REQUIREMENTS], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"{done.stdout}{done.stderr}".strip() or "pip failed"


class Worker:
    """The process: ``ask`` sends a request and returns the answer."""

    def __init__(self, packages: Path) -> None:
        here = str(Path(__file__).parent)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{packages}:{here}", "HF_HUB_OFFLINE": "1"},
        )
        self.version = self.ask({"do": "version"})["version"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the process has ended ({self.process.wait()}); what it said is in the captured stderr"
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def make(name: str, folder: str) -> None:
    """A model of the zoo, of no constants, with a tokenizer."""
    import tokenizers
    import transformers

    model = zoo.build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms begin at constants
                parameter.add_(0.1 * torch.randn_like(parameter))
    if hasattr(model.config, "rope_theta"):  # which a reader that does not find it takes for 10,000
        model.config.rope_theta = 700.0
    model.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: k for k, c in enumerate("abcdefgh")}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def run(name: str, folder: str, out: str) -> dict[str, Any]:
    """The tokens of ``TEXT``; what the model in a folder computes, and its weights, go to a file."""
    import transformers
    from safetensors.torch import save_file

    model = load(folder)
    with torch.no_grad():
        found = model(**zoo.batches(name)[0])
    value = next(
        found[key]
        for key in ("logits", "prediction_logits", "last_hidden_state")
        if key in found.keys()  # noqa: SIM118
    )
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_file({VALUE: value.contiguous(), **weights}, out)
    return {"tokens": transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]}


def load(folder: str) -> nn.Module:
    """The model of a folder through the Auto class that knows it, in evaluation mode, every weight found."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    (kind,) = config.architectures
    options = {"output_loading_info": True, "torch_dtype": "float32"}
    for name in AUTO:
        known = getattr(transformers, name)._model_mapping.get(type(config), None)
        kinds = known if isinstance(known, tuple | list) else (known,)
        if kind in {getattr(k, "__name__", None) for k in kinds}:
            model, found = getattr(transformers, name).from_pretrained(folder, **options)
            break
    else:
        model, found = getattr(transformers, kind).from_pretrained(folder, **options)
    assert type(model).__name__ == kind
    assert not found["missing_keys"], found
    return model.eval()


def serve() -> None:
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints elsewhere
    work = {"make": make, "run": run, "version": lambda: {"version": transformers.__version__}}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = work[request.pop("do")](**request) or {}
        except (Exception, pytest.skip.Exception) as error:  # the zoo skips what this version has not
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
