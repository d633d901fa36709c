"""What a user should know about an answer beside the answer: cut off, empty, doubtful, or asked in other words."""

from collections.abc import Collection, Iterator

from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.tasks.confidence import words_logprob
from paligemma_jax.tasks.output import Output
from paligemma_jax.tasks.prompts import Prompt, advice, read_prompt

DOUBT = -0.7  # mean log-probability of a token of an answer's words: about one half (benchmarks/results/doubt.md)
_OBJECT_TOKENS = 8  # of an object without mask, with a short label and what goes before it


def remarks(
    output: Output,
    prompt: Prompt,
    found: Collection[object],
    dropped: Collection[str],
    max_new_tokens: int,
    constrain: bool,
    tokenizer: Tokenizer | None,
) -> Iterator[str]:
    """Remarks about one answer, each a line without its first words.

    Args:
      found, dropped: complete objects of the answer, and texts of incomplete ones.
      max_new_tokens, constrain: with which it was generated.
      tokenizer: whose tokens it has; None when their log-probabilities are not known.
    """
    names, task = " ; ".join(prompt.labels), prompt.task
    if output.finish_reason == "length":
        yield f"cut off after {output.timing.new_tokens} tokens, max_new_tokens allows no more"
    if dropped:
        yield f"incomplete objects in the answer, left out: {len(dropped)}"
    room = max_new_tokens - output.timing.new_tokens
    if constrain and names and room < _OBJECT_TOKENS + task.num_codes:
        yield f"max_new_tokens={max_new_tokens} left no room for another object"
    if task is not None and task.has_objects and not names:
        yield f"no class is named: say what to look for, as in {task.name} cat ; dog"
    elif not output.text.strip():
        yield f"no boxes: no {names} was found" if names else "the answer is empty"
    logprob = None if tokenizer is None else words_logprob(output, tokenizer)
    if logprob is not None and logprob < DOUBT:
        yield f"the model doubts this answer: its words have a mean log-probability of {logprob:.2f}"
    if (better := advice(prompt)) and not (found or dropped if read_prompt(better).labels else output.text.strip()):
        yield f'models know lower-case words, names with " ; " between them: try "{better}"'
