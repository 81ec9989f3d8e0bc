"""Turn text into tokens and back, with the tokenizer and the chat template of a checkpoint directory."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from dejavu.errors import ModelError, UsageError
from dejavu.model.detokenizer import Detokenizer, make_detokenizer

Message = Mapping[str, Any]
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Encode, decode and apply the chat template; `backend` is a `tokenizers.Tokenizer`."""

    backend: Any
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # "bos_token": "<s>", ...
    chat_template: str | None = None
    special_ids: frozenset[int] = frozenset()  # the tokens that decoding leaves out

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Give the tokens of `text`, with the beginning-of-sequence token where the model wants one."""
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Give the text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def chat(self, messages: str | Sequence[Message]) -> list[int]:
        """Give the prompt's tokens for a conversation (or one user text), up to where the assistant's answer begins.

        Raises UsageError where the model has no chat template, or its template refuses the conversation.
        """
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: str | Sequence[Message]) -> str:
        """Give the prompt's text for a conversation, as `apply_chat_template(add_generation_prompt=True)` does."""
        if self.chat_template is None:
            raise UsageError("this model has no chat template: give a plain prompt, or an instruction-tuned model")
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        try:
            template = _chat_environment().from_string(self.chat_template)
            given = {"messages": conversation, "tools": None, "documents": None, "add_generation_prompt": True}
            return str(template.render(**given, **self.special_tokens))
        except Exception as error:  # a stranger's program: it may fail in any way
            raise UsageError(f"the chat template refuses the messages ({error}): mend their roles or order") from error

    def stream(self, skip_special_tokens: bool = True) -> Detokenizer:
        """Make an incremental detokenizer; what it gives, put together, is `decode` of all its tokens."""
        return make_detokenizer(self.backend, self.special_ids if skip_special_tokens else frozenset())

    @property
    def vocab_size(self) -> int:
        """Count the tokens, added ones among them."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        """Give the token that begins a sequence; None where the model has none."""
        return self.token_id(self.special_tokens.get("bos_token"))

    @property
    def eos_token_id(self) -> int | None:
        """Give the token that ends a sequence; a model may have further ones, which its ModelSpec lists."""
        return self.token_id(self.special_tokens.get("eos_token"))

    def token_id(self, token: str | None) -> int | None:
        """Give the id of `token`, written as in the vocabulary; None where it has none."""
        found = None if token is None else self.backend.token_to_id(token)
        return None if found is None else int(found)


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """Load the tokenizer of a checkpoint directory: tokenizer.json, else GPT-2's vocab.json and merges.txt.

    None where the directory has neither. Raises ModelError where one cannot be read.
    """
    config = _read_json(directory / "special_tokens_map.json") | _read_json(directory / "tokenizer_config.json")
    backend = _load_backend(directory)
    if backend is None:
        return None
    backend.no_truncation()
    backend.no_padding()
    special = _special_tokens(config)
    if not (directory / "tokenizer.json").is_file():
        _add_specials(backend, special)
    if "add_bos_token" in config or "add_eos_token" in config:
        set_affixes(backend, config)
    hidden = frozenset(token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special)
    return Tokenizer(backend, special, _chat_template(directory, config), hidden)


def set_affixes(backend: Any, config: Mapping[str, Any]) -> None:
    """Let encoding add the tokens that `config` asks for: before a text `add_bos_token`, behind it `add_eos_token`."""
    from tokenizers import processors

    special = _special_tokens(config)
    bos = special.get("bos_token") if config.get("add_bos_token") else None
    eos = special.get("eos_token") if config.get("add_eos_token") else None
    backend.post_processor = processors.TemplateProcessing(
        single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token],
    )


def _load_backend(directory: Path) -> Any:
    """Load the `tokenizers.Tokenizer` of a directory; None where it has none."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    whole, vocab, merges = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            return Backend.from_file(str(whole))
        if not (vocab.is_file() and merges.is_file()):
            return None
        backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise ModelError(f"cannot read the tokenizer in {directory} ({error}): download it again") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_specials(backend: Any, special: Mapping[str, str]) -> None:
    """Let the named special tokens be matched whole."""
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special.values()])


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file is an empty one. Raises ModelError for a malformed one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is no JSON ({error}): download it again") from error
    return value if isinstance(value, dict) else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Give the special tokens of a tokenizer's configuration, written plainly or as objects with their `content`."""
    named = ((name, config.get(name)) for name in _SPECIAL_NAMES)
    plain = ((name, token.get("content") if isinstance(token, dict) else token) for name, token in named)
    return {name: token for name, token in plain if isinstance(token, str)}


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Give the chat template: of its own file, else of the configuration, of several the one named "default"."""
    own = directory / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _chat_environment() -> Any:
    """Make the sandbox for chat templates, with the extras that they may use; templates come from strangers.

    Source: transformers' `apply_chat_template`, whose documentation promises these names to templates.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_block(), "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Write JSON without jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_template_error(message: str) -> None:
    """Let a template refuse a conversation."""
    from jinja2 import TemplateError

    raise TemplateError(message)


def _generation_block() -> Any:
    """Make the extension for `{% generation %}`, which marks words for training: here, just its body."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationBlock(Extension):
        """Render the body of a generation block in its own scope."""

        tags = {"generation"}  # noqa: RUF012 (jinja reads it from the class)

        def parse(self, parser: Any) -> nodes.Scope:
            """Parse up to `endgeneration`."""
            line = next(parser.stream).lineno
            return nodes.Scope(list(parser.parse_statements(("name:endgeneration",), drop_needle=True)), lineno=line)

    return GenerationBlock
