"""The model directory's tokenizer and chat template, read without transformers, so that no process needs torch for it.

What matters here is the difference between *structure* and *text*. `encode` turns control tokens (`<|im_end|>`,
`</tool_response>`) into their ids: for what the template writes. `encode_literal` never does: for what a tool
prints. Rendering follows transformers' template environment exactly (a test compares the two).
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from aster.data.formats import valid
from aster.errors import TemplateError

if TYPE_CHECKING:
    import jinja2
    from tokenizers import Tokenizer

_BRACKETED = re.compile(r"<.*>|\[.*\]", re.DOTALL)


class ModelTokenizer:
    """Ids of structure and of text; `control` maps each control token to its id.

    A control token is an added token that is special or written in brackets (`<tool_call>`, `[INST]`). Other added
    tokens are vocabulary, such as a phrase token `\\boxed{`.
    """

    def __init__(self, tokenizer: Tokenizer, *, eos: str | None = None, pad: str | None = None) -> None:
        from tokenizers import Tokenizer as _Tokenizer

        self._structure = tokenizer
        body = json.loads(tokenizer.to_str())
        for token in body["added_tokens"]:
            token["special"] = token["special"] or bool(_BRACKETED.fullmatch(token["content"]))
        self.control = {t["content"]: int(t["id"]) for t in body["added_tokens"] if t["special"]}
        self._literal = _Tokenizer.from_str(json.dumps(body))
        self._literal.encode_special_tokens = True
        self.special = frozenset(t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special)
        self._special = _any_of(self.special)
        self._control = _any_of(self.control)
        for text, token in self.control.items():
            if token in self.encode_literal(text):
                raise TemplateError(f"the tokenizer cannot spell {text!r} without its control token {token}")
        self.vocab_size = int(tokenizer.get_vocab_size(with_added_tokens=True))
        self.eos_id = None if eos is None else self.token_id(eos)
        self.pad_id = self.eos_id if pad is None else self.token_id(pad)

    @classmethod
    def from_model_dir(cls, path: str | Path) -> ModelTokenizer:
        from tokenizers import Tokenizer as _Tokenizer

        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise TemplateError(f"no tokenizer.json in {folder}: save the tokenizer there with save_pretrained()")
        tokenizer = _Tokenizer.from_file(str(file))
        tokenizer.no_truncation()  # a file may carry both; either would change a trajectory silently
        tokenizer.no_padding()
        config = read_tokenizer_config(folder)
        for key, token in config.get("added_tokens_decoder", {}).items():
            if tokenizer.token_to_id(token["content"]) != int(key):
                raise TemplateError(
                    f"{folder}: tokenizer_config.json gives {token['content']!r} the id {key}, tokenizer.json gives "
                    f"{tokenizer.token_to_id(token['content'])}: save the tokenizer again with save_pretrained()"
                )
        return cls(tokenizer, eos=token_text(config.get("eos_token")), pad=token_text(config.get("pad_token")))

    def token_id(self, text: str) -> int:
        token = self._structure.token_to_id(text)
        if token is None:
            raise TemplateError(f"the tokenizer has no token {text!r}")
        return int(token)

    def encode(self, text: str) -> list[int]:
        """Ids of text that the template wrote: control tokens become their ids."""
        return list(self._structure.encode(valid(text), add_special_tokens=False).ids)

    def encode_literal(self, text: str) -> list[int]:
        """Ids of text that somebody else wrote: no control token can come of it."""
        return list(self._literal.encode(valid(text), add_special_tokens=False).ids)

    def encode_turn(self, text: str) -> list[int]:
        """Ids of a turn as the model would sample it: `<tool_call>` is its token, `<|im_end|>` is only text."""
        ids: list[int] = []
        for i, part in enumerate(self._special.split(valid(text))):
            if part:
                ids += self.encode_literal(part) if i % 2 else self.encode(part)
        return ids

    def literal_spans(self, text: str) -> list[tuple[int, int]]:
        """Character span of each token of `encode_literal(text)`, for cutting text at token borders."""
        return list(self._literal.encode(valid(text), add_special_tokens=False).offsets)

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        return str(self._structure.decode(ids, skip_special_tokens=skip_special))

    def split_after_last_control(self, text: str) -> int:
        """Where the text after the last control token begins; 0 without one."""
        return max((m.end() for m in self._control.finditer(text)), default=0)

    def split_before_first_control(self, text: str) -> int:
        match = self._control.search(text)
        return match.start() if match else len(text)

    def last_special(self, text: str) -> str | None:
        """The last special token that is written out in `text`."""
        found = self._special.findall(text)
        return found[-1] if found else None


class ChatTemplate:
    """One compiled template; `render` is transformers' `apply_chat_template(tokenize=False)`."""

    def __init__(self, source: str, *, special_tokens: dict[str, str], where: str = "the chat template") -> None:
        self.source = source
        self.where = where
        self._special_tokens = special_tokens
        self._template = _compile(source, where)

    @classmethod
    def from_model_dir(cls, path: str | Path) -> ChatTemplate:
        folder = Path(path)
        config = read_tokenizer_config(folder)
        file = folder / "chat_template.jinja"
        source = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several named templates: transformers takes tool_use when there are tools
            named = {item["name"]: item["template"] for item in source}
            source = named.get("tool_use", named.get("default"))
        if not source:
            raise TemplateError(
                f"{folder} has no chat template: put a chat_template.jinja that renders tools and the tool role there"
            )
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: text for name in names if (text := token_text(config.get(name))) is not None}
        return cls(source, special_tokens=tokens, where=f"the chat template of {folder}")

    def render(
        self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None, add_generation_prompt: bool
    ) -> str:
        """Raises TemplateError with the template's own complaint."""
        import jinja2

        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            roles = [message["role"] for message in messages]
            raise TemplateError(f"{self.where} cannot render the roles {roles}: {error}") from error


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}


def generation_stops(folder: Path, tokenizer: ModelTokenizer) -> list[int]:
    """End-of-sequence ids that an engine would stop at anyway."""
    stops = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    file = folder / "generation_config.json"
    if file.is_file():
        eos = json.loads(file.read_text("utf-8")).get("eos_token_id")
        stops += eos if isinstance(eos, list) else [] if eos is None else [eos]
    return stops


def token_text(entry: Any) -> str | None:
    """A special token of tokenizer_config.json: a string, or an object with `content`."""
    return entry["content"] if isinstance(entry, dict) else entry


def _any_of(tokens: Any) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)()")


def _compile(source: str, where: str) -> jinja2.Template:
    """transformers' environment: sandboxed, trimmed blocks, loop controls, plain-JSON `tojson`, `{% generation %}`."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` marks assistant text for transformers; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own protocol

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"{where} does not compile: line {error.lineno}: {error.message}") from None
