"""The call that gives the same answer: by the command line, in Python, and over HTTP with curl."""

import base64
import dataclasses
import io
import json
import mimetypes
import shlex
from typing import Any

import paligemma_jax as pj
from paligemma_jax.processing.request import GenerateOptions
from paligemma_jax.serving.web.questions import Question

_CONFIG_KEYS = ("adapter", "quantization", "resample", "mask_vae", "loc_scale")


@dataclasses.dataclass(frozen=True)
class Source:
    """What answers: a model, and perhaps the server that it is asked through.

    checkpoint: as `pj.load` takes it, "" for a model that only its server knows.
    dtype: of weights and activations.
    quantization, adapter, resample, mask_vae, loc_scale: as keys of the command line; "" and defaults are left out.
    server: address of a running one; "" when the model is in this process.
    needs_key: the server wants a key, which calls take from PALIGEMMA_API_KEY.
    """

    checkpoint: str
    dtype: str = "float32"
    quantization: str = "none"
    adapter: str = ""
    resample: str = "auto"
    mask_vae: str = ""
    loc_scale: int = 1023
    server: str = ""
    needs_key: bool = False


_PLAIN = Source("")


def command(source: Source, question: Question) -> str:
    """A line for the shell."""
    if source.server:
        return "# the command line needs the model: this page asks a server, which alone knows where it is"
    keys = {"checkpoint": source.checkpoint, "dtype": source.dtype}
    keys |= {name: getattr(source, name) for name in _CONFIG_KEYS if getattr(source, name) != getattr(_PLAIN, name)}
    keys |= {"image": question.name, "prompt": question.prompt.text} | _settings(question.options)
    return " \\\n    ".join(
        ["python main.py", *(shlex.quote(f"--config.{key}={value}") for key, value in keys.items())]
    )


def python(source: Source, question: Question) -> str:
    """A program in Python."""
    options, sampling = question.options, question.options.sampling
    if source.server:
        body = {key: value for key, value in _body(question, "").items() if key != "messages"}
        key = ', os.environ["PALIGEMMA_API_KEY"]' if source.needs_key else ""
        return "\n".join(
            [
                "from client import Client  # docs/deploy/client.py of this project, which needs nothing else",
                *(["import os"] if source.needs_key else []),
                "",
                f"client = Client({source.server!r}{key})",
                f"print(client.ask({question.prompt.text!r}, {question.name!r}{_keywords(body)}))",
            ]
        )
    given = {"dtype": source.dtype}
    if source.quantization != _PLAIN.quantization:
        given["quantization"] = source.quantization
    given |= {name: value for name in ("adapter", "mask_vae") if (value := getattr(source, name))}
    arguments = {"max_new_tokens": options.max_new_tokens}
    drawn = _changed(sampling, pj.Sampling())
    lines = ["import paligemma_jax as pj", "", f"model = pj.load({source.checkpoint!r}{_keywords(given)})"]
    if source.resample != _PLAIN.resample:
        lines.insert(0, "import dataclasses\n")
        lines.append(f"settings = dataclasses.replace(model.processor.image_settings, resample={source.resample!r})")
        lines.append("model.processor = dataclasses.replace(model.processor, image_settings=settings)")
    if drawn:
        lines.append(f"sampling = pj.Sampling({_keywords(drawn).removeprefix(', ')})")
    asked = f"{question.name!r}, {question.prompt.text!r}{_keywords(arguments)}"
    asked += (", sampling=sampling" if drawn else "") + (", constrain=True" if options.constrain else "")
    return "\n".join([*lines, f"[output] = model.generate({asked})", "print(output.text)"])


def curl(source: Source, question: Question) -> str:
    """A line for the shell that asks a server; the picture goes through a pipe, as it may be too long an argument."""
    lines = []
    if not source.server:
        model = f"--config.checkpoint={source.checkpoint}"
        start = ["python main.py --config=configs/serve.py", shlex.quote(model), f"--config.dtype={source.dtype}"]
        lines.append("# a server for it, in another terminal: " + " ".join(start))
    address = source.server or "http://127.0.0.1:8000"
    body = json.dumps(_body(question, "PICTURE"), ensure_ascii=False).replace("%", "%%").replace("\\", "\\\\")
    kind = mimetypes.guess_type(question.name)[0] or "image/png"
    body = body.replace('"PICTURE"', f'"data:{kind};base64,%s"', 1)
    picture = f"\"$(base64 < {shlex.quote(question.name)} | tr -d '\\n')\""
    lines.append(f"printf {shlex.quote(body)} {picture} |")
    key = ' -H "authorization: Bearer $PALIGEMMA_API_KEY"' if source.needs_key else ""
    lines.append(f'    curl -fsS {address}/v1/chat/completions -H "content-type: application/json"{key} -d @-')
    return "\n".join(lines)


def chat_body(question: Question) -> dict[str, Any]:
    """The chat completion that asks a question, with its picture as a PNG."""
    file = io.BytesIO()
    question.picture.save(file, format="PNG", compress_level=1)
    return _body(question, f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")


def _body(question: Question, url: str) -> dict[str, Any]:
    """The fields of a chat completion about a picture at a URL."""
    settings = _settings(question.options)
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question.prompt.text},
    ]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
    body["max_tokens"] = question.options.max_new_tokens
    settings.pop("max_new_tokens", None)
    return body | {"seed": question.options.sampling.seed} | settings


def _settings(options: GenerateOptions) -> dict[str, Any]:
    """Settings that are not the command line's own, by their names there."""
    plain = GenerateOptions()
    settings = _changed(options.sampling, plain.sampling)
    if options.max_new_tokens != plain.max_new_tokens:
        settings["max_new_tokens"] = options.max_new_tokens
    return settings | ({"constrain": True} if options.constrain else {})


def _changed(values: Any, plain: Any) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(values))
    return {name: value for name in names if (value := getattr(values, name)) != getattr(plain, name)}


def _keywords(values: dict[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in values.items())
