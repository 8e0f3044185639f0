"""The built-in calibration text: everyday passages, and the documentation that comes with every Python.

It is there so that quantisation by data needs no file; text like what a model will see serves it better.
"""

from __future__ import annotations

from pydoc_data.topics import topics

# One passage a paragraph.
_PASSAGES = """\
Once upon a time there was a little girl who lived near the forest with her mother and a small dog. Every
morning she walked to the well, and every evening she told the dog what she had seen on the way. One day
the well was dry. She sat down on the stones and thought. Then she heard a voice from deep below.

The committee will meet on Tuesday at ten o'clock to discuss the budget for the coming year. Members who
cannot attend are asked to send their comments by Friday noon. Last year's figures are attached; the cost
of heating has risen by 12.5 percent, while income from rent has stayed the same.

"Where are you going?" asked Tom. "To the park," said Lily, "because the sun is shining, and Grandma says
it will rain tomorrow." Tom put on his shoes. "Wait for me! I want to show you my new red kite." They ran
down the hill together, laughing, and the kite rose higher than the trees.

Question: Why is the sky blue? Answer: Sunlight is scattered by the molecules of the air, and short waves
are scattered much more than long ones. What reaches the eye from all over the sky is therefore mostly
blue, while the light that comes straight from the setting sun has lost its blue and looks red.

1. Wash the apples and cut them into pieces. 2. Put everything into a large pot with a cup of water. 3.
Cook for twenty minutes and stir from time to time. 4. Add sugar, lemon and a little cinnamon, let it cool,
and fill it into clean jars.

Der Zug nach Norden fährt um 7.42 Uhr von Gleis 3. Bitte beachten Sie, dass der Speisewagen heute fehlt.
Le marché ouvre à huit heures; on y trouve du pain, du fromage et des fleurs. La biblioteca cierra los
lunes, pero los niños pueden leer en el patio.

{"order": 10482, "customer": {"name": "A. Weber", "city": "Graz"}, "count": 3, "price": 19.99}
"""


def built_in_documents() -> tuple[str, ...]:
    """The texts, passages first, in an order that is always the same."""
    passages = (" ".join(passage.split()) for passage in _PASSAGES.split("\n\n"))
    return (*passages, *(topics[name].strip() for name in sorted(topics)))
