"""Makes captions.json: words and CIDEr-D by the reference implementation, which needs Java for its tokenizer.

pip install pycocoevalcap && python tests/golden/make_captions.py
"""

import json
from pathlib import Path

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

ODD = """A man's dog isn't there.
Two people -- one tall, one short -- are walking; they're happy!
a "stop" sign & a red/white bus at 5:30 p.m.
U.S. flag on a T-shirt (blue) in front of St. John's church
it costs $3.50, 20% off... ok?
A cat can't, won't and cannot sit on the grandparents' couch.
black-and-white photo of the 1990's
rock 'n' roll
gonna wanna I'm we've he'd you'll
an e-mail to a@b.com at http://x.org/y?z=1
50's diner's sign, 'open'
a café and naïve cafe\u0301
#1 dad *star* foo_bar [x] {y} <z>
Mr. Smith vs. Dr. Jones etc.
the U.S.
a 3/4 view 1/2 10,000 people
no. 5 and no.5
A dog;a cat:a bird
d'oh o'clock y'all
and/or either/or
...
its 12:30am 10th 2nd
what?! no!!
a man with his arm's up.A woman
can't've it's
“quoted” ‘single’ it’s — dash …
(a) a. b) 5' 6" tall
lemme gimme gotta dunno
o.k. a.m
A woman in a yellow-green dress doesn't look at the camera , she reads .
three zebras,two giraffes and 12 birds near a water hole
A sign that says "Main St." and "4th Ave."
a plate of mac & cheese w/ broccoli
The clock reads 10:10.
people waiting at the bus-stop @ night""".replace("\\u0301", "\u0301").split("\n")
IMAGES = [  # a prediction, and what people wrote
    (
        "a man riding a wave on a surfboard",
        [
            "A man riding a wave on top of a surfboard.",
            "A surfer rides a large wave.",
            "a person on a surf board in the ocean",
            "A man surfs on a wave in the sea.",
            "Surfer on a white wave",
        ],
    ),
    (
        "a cat is sleeping on a couch",
        [
            "A cat sleeping on a couch next to a pillow.",
            "a brown cat lies on a sofa",
            "The cat's asleep on the couch.",
            "A cat naps.",
            "A furry cat on a grey couch",
        ],
    ),
    (
        "two dogs playing with a frisbee in the grass",
        [
            "Two dogs play with a frisbee on the grass.",
            "Two dogs are jumping for a frisbee in a park",
            "dogs with a frisbee",
        ],
    ),
    (
        "a red double decker bus",
        [
            "A red double-decker bus driving down a street.",
            "a red bus in London",
            "A double decker bus on the road near a man riding a bike",
        ],
    ),
    ("", ["A plate of food on a table.", "Food on a white plate"]),
    ("a man a man a man a man riding a wave", ["A bathroom with a toilet and a sink.", "a white toilet"]),
    (
        "a group of people standing around a table with food on it and talking to each other in a room",
        ["People around a table.", "A group of people standing around a table."],
    ),
    ("a giraffe standing next to a tree", ["a giraffe standing next to a tree"]),
]


def tokenize(captions: list[list[str]]) -> list[list[str]]:
    found = PTBTokenizer().tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(captions)})
    return [found[i] for i in range(len(captions))]


if __name__ == "__main__":
    said, right = tokenize([[text] for text, _ in IMAGES]), tokenize([texts for _, texts in IMAGES])
    mean, each = Cider().compute_score(dict(enumerate(right)), dict(enumerate(said)))
    golden = {
        "words": [[text, found[0]] for text, found in zip(ODD, tokenize([[text] for text in ODD]), strict=True)],
        "images": [{"prediction": text, "references": texts} for text, texts in IMAGES],
        "cider": float(mean),
        "per_image": [float(value) for value in each],
    }
    Path(__file__).with_name("captions.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
