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
people waiting at the bus-stop @ night
rock&roll AT&T
people at a B&B
A Harley-Davidson motorcycle parked in front of a 7-11.
A jet airliner, flight #123, lands at J.F.K. airport
a man in a 3-piece suit (with tie)
5 cats and 1/2 a dog at 10:30am on Dec. 25, 2010
two men playing Wii(tm) in a living room
A TV showing "The Simpsons" & remotes/controllers
a close-up of a hot-dog w/ mustard, ketchup, & relish
It's a bird... no, it's a plane!
The cat's eyes are half-closed; its tail isn't visible.
Couple's wedding cake on Mr. and Mrs. Jones' table
a double-decker bus, route no. 12, to St. Pancras
A sandwich, chips and soda for $5.99!
A sign reading 'Do Not Enter'
people at a B&B in the 1950s
An elephant (or two) near a watering hole - dusty
A man ( with hat ) and a woman
a 50% off sale sign at the store's window.
The car is going 60mph
an orange-and-black cat w/ green eyes
a girl holding an i-pod & iPhone
a "do not walk" sign... in red.
Three teddy bears, each a different color, snuggling together.
I can't see it. I'd say it's a dog's bed.
Someone's "lunch": rice, beans, & salsa!!
an old fashioned (1920's) car
A man throws a frisbee @ the park
A tennis player's serve at Wimbledon, 2009.
two plates of food- one with eggs
people sit at tables outside cafe'
a plate of food-fish and chips
A picture of a street sign that say's "Elm St".
a clock on a tower reads 12:45 p.m.
1. a man 2. a dog
a living room with t.v. and couch
A man's and woman's bathroom sign.
This is a picture of a dog, cat, etc.
Dr. Who's TARDIS in the U.K.
A black & white photo of N.Y.C. skyline""".replace("\\u0301", "\u0301").split("\n")
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
