"""OpenAI's own client asks for embeddings."""

import openai
import pytest
from conftest import conversation, make_model
from serving import serving

ROWS = [
    conversation("How do I boil an egg?", "Seven minutes in hot water."),
    conversation("What can you not know?", "The future."),
]


@pytest.fixture
def client(causal):
    with serving(make_model(causal), api_key="secret") as http:
        yield openai.OpenAI(
            base_url="http://testserver/v1", api_key="secret", http_client=http, max_retries=0
        )


@pytest.fixture
def wanted(causal):
    out = make_model(causal).score(ROWS)
    rows = zip(out.rewards.tolist(), out.score.tolist(), strict=True)
    return [pytest.approx([*rewards, score], abs=1e-4) for rewards, score in rows]


@pytest.mark.parametrize("how", [{}, {"encoding_format": "float"}], ids=["base64", "float"])
def test_embeddings_are_rewards_and_the_score(how, client, causal, wanted):
    """Unless it is told otherwise, the client asks for base64 and decodes it."""
    texts = [causal.tokenizer.apply_chat_template(row, tokenize=False) for row in ROWS]
    reply = client.embeddings.create(model="tiny", input=texts, **how)
    assert reply.model == "tiny"
    assert [datum.index for datum in reply.data] == [0, 1]
    assert [datum.embedding for datum in reply.data] == wanted
    one = client.embeddings.create(model="tiny", input=texts[0], dimensions=6, **how)
    assert one.data[0].embedding == wanted[0]


def test_refusals_are_errors_of_the_client(client):
    with pytest.raises(openai.UnprocessableEntityError, match="no response begins in it"):
        client.embeddings.create(model="tiny", input="Just words")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").embeddings.create(model="tiny", input="Hi")
