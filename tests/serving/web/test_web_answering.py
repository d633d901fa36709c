"""An answer as the page sees it grow."""

import asyncio
import json
import threading

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import Busy, CheckpointError, EngineFailed
from paligemma_jax.serving.answer import Answer
from paligemma_jax.serving.listening import listen
from paligemma_jax.serving.web import answering, files
from paligemma_jax.serving.web.answering import Visits
from tests.serving.web.conftest import STAR, Served, finished, output, question

SEGS = "".join(f"<seg{i:03d}>" for i in range(16))


def collect(backend, asked, visits=None, visitor="me", on=lambda shown: None):
    """All that is shown."""

    async def run():
        seen = []
        async for shown, _ in answering.answer(backend, visits or Visits(), visitor, asked):
            seen.append(shown)
            on(shown)
        return seen

    return asyncio.run(asyncio.wait_for(run(), 20))


def test_an_answer_grows(backend):
    served = Served(["a ", "", "red ", "circle"], by_turns=True)
    seen = collect(backend(served), question(), on=lambda shown: served.go_on())
    assert [shown.text for shown in seen] == ["", "a ", "a red ", "a red circle", "a red circle"]
    assert [shown.ended for shown in seen] == [False] * 4 + [True]
    assert seen[0].waiting and not seen[1].waiting
    assert served.asked[0][1] == "me" and served.cancelled == 0


def test_objects_come_as_soon_as_they_are_complete(backend):
    served = Served([STAR[:20], STAR[20:] + SEGS, " star", " ; "], by_turns=True)
    seen = collect(backend(served), question("segment star"), on=lambda shown: served.go_on())
    assert [len(shown.objects) for shown in seen] == [0, 0, 1, 1, 1, 1]
    assert seen[-1].objects[0].score == 0.5 and seen[-1].objects[0].mask.shape == (20, 40)
    assert seen[-2].objects[0].score is None


def test_who_looks_late_sees_all_at_once(backend):
    seen = collect(backend(Served(["a "] * 1000)), question())
    assert [len(shown.text) for shown in seen] == [0, 2000]


def test_large_pictures_are_shown_smaller(backend):
    [*_, last] = collect(backend(Served([STAR, " star"])), question("detect star", size=(2560, 1280)))
    assert last.picture.size == (1280, 640) and last.objects[0].box[2] == 1280


@pytest.mark.parametrize(
    "served, says",
    [
        (Served(error=Busy("come again")), "come again"),
        (Served(error=EngineFailed("/secret path")), "could not be generated"),
        (Served(error=RuntimeError("secret")), "the log of the page"),
        (CheckpointError("no model is loaded: x\ny"), "no model is loaded: x y"),
    ],
)
def test_what_goes_wrong_is_one_line(backend, served, says):
    [*_, last] = collect(backend(served), question())
    assert says in last.error and "\n" not in last.error and "secret" not in last.error and last.ended


def test_what_is_odd_is_noted(backend):
    [*_, last] = collect(backend(Served([""])), question("detect Cat"))
    assert any("no Cat was found" in note for note in last.notes)
    assert any('try "detect cat"' in note for note in last.notes)


def test_stop_ends_what_the_visitor_asked_and_nothing_else(backend):
    visits, served = Visits(), Served(["a ", "b "], end=False)
    other = Served(["x"], end=False)
    number = visits.begin("other")
    visits.attach("other", number, other.ask(question(), "other"))
    seen = collect(backend(served), question(), visits, on=lambda shown: shown.text == "a b " and visits.stop("me"))
    assert seen[-1].stopped and seen[-1].text == "a b " and not seen[-1].error
    assert served.cancelled == 1 and other.cancelled == 0
    visits.stop("nobody")
    visits.stop("other")
    assert other.cancelled == 1 and other.answers[0].ended


def test_stop_while_there_is_no_model(backend):
    visits = Visits()
    seen = collect(backend(None), question(), visits, on=lambda shown: shown.waiting and visits.stop("me"))
    assert seen[-1].stopped


def test_an_answer_that_nobody_listens_to_is_cancelled(backend):
    async def run():
        answers = answering.answer(backend(served), Visits(), "me", question())
        async for shown, _ in answers:
            if shown.text:
                break
        await answers.aclose()

    served = Served(["a"], end=False)
    asyncio.run(run())
    assert served.cancelled == 1


def test_a_question_waits_for_the_model(backend):
    served, looks = Served(["a"]), []

    def late():
        looks.append(1)
        return served if len(looks) > 2 else None

    later = backend(None)
    later.served = late
    assert collect(later, question())[-1].finished and len(looks) == 3


def test_listening_hears_all_answers_and_their_errors():
    answers = [Answer(lambda: None), Answer(lambda: None)]

    async def hear():
        return [(index, event.output.text) async for index, event in listen(answers)]

    threading.Thread(target=lambda: [a.put(finished(str(i))) for i, a in enumerate(answers)]).start()
    assert sorted(asyncio.run(hear())) == [(0, "0"), (1, "1")]
    answers[0] = Answer(lambda: None)
    answers[0].put(Busy("x"))
    with pytest.raises(Busy):
        asyncio.run(hear())


def test_files_of_an_answer(tmp_path):
    pytest.importorskip("pycocotools")
    asked, text = question("segment star", "my star.png"), f"{STAR}{SEGS} star"
    found, dropped = Served().objects(output(text), asked.picture.size, ("star",))
    written = files.write_files(tmp_path / "x", asked, output(text), found, dropped)
    record = json.loads(written.json.read_text())
    assert record["text"] == text and record["prompt"] == "segment star" and len(record["masks"]) == 1
    dataset = json.loads(written.coco.read_text())
    assert dataset["images"] == [{"id": 1, "file_name": "my star.png", "width": 40, "height": 20}]
    assert dataset["categories"][0]["name"] == "star" and dataset["annotations"][0]["segmentation"]["counts"]
    drawn = Image.open(written.png)
    assert drawn.size == (40, 20) and np.ptp(np.asarray(drawn)) > 0
    assert [path.name for path in sorted((tmp_path / "x").iterdir())] == [
        *("my star.json", "my star_coco.json", "my star_drawn.png"),
    ]


def test_words_alone_are_a_json_file(tmp_path):
    written = files.write_files(tmp_path, question(), output("a star"), [], [])
    assert written.coco is None and written.png is None and written.json.exists()
