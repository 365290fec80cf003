"""Which prompts make up which request, which client sends it, and with which seeds."""

import pytest

from darkroom.errors import InvalidRequest
from darkroom.triton.load import Load
from darkroom.triton.prompts import Prompt


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"seed": 1}, {}, "prompts.jsonl:1 and prompts.jsonl:2 differ in seed"),
        ({}, {"steps": 2}, "prompts.jsonl:1 and prompts.jsonl:2 differ in steps"),
        ({"height": 64}, {"height": 128}, "differ in height"),
        ({"num_images": 2}, {"num_images": 1}, "differ in num_images"),
    ],
)
def test_rows_that_cannot_share_a_request_are_refused_by_their_lines(
    first: dict[str, int], second: dict[str, int], said: str
) -> None:
    rows = tuple(
        Prompt({"prompt": "a"} | row, f"prompts.jsonl:{index + 1}") for index, row in enumerate((first, second))
    )
    Load(rows)  # alone each may be sent
    for more in ({}, {"requests": 5}):
        with pytest.raises(InvalidRequest, match=said):
            Load(rows, batch_size=2, **more)
    with pytest.raises(InvalidRequest):
        Load((rows[0], rows[0], rows[1], rows[1], rows[0]), batch_size=2, requests=5)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("clients", [1, 2, 5])
@pytest.mark.parametrize("requests", [None, 1, 4])
def test_image_k_of_all_has_seed_s_plus_k(batch: int, clients: int, requests: int | None) -> None:
    prompts = tuple(Prompt({"prompt": name, "num_images": 2}) for name in "abcd")
    load = Load(prompts, clients, requests, batch, seed=10)
    shares = load.shares()
    if requests is None:
        sent = [next(shares[turn % clients]) for turn in range(load.total)]
        assert all(next(share, None) is None for share in shares)
    else:
        each = [list(share) for share in shares]
        assert [len(share) for share in each] == [requests] * clients
        sent = [index for share in each for index in share]
    assert sorted(sent) == list(range(load.total))
    rows = [row for index in range(load.total) for row in load.request(index)]
    assert len(rows) == (4 if requests is None else clients * requests * batch)
    assert [row.fields["prompt"] for row in rows] == ["abcd"[number % 4] for number in range(len(rows))]
    seeds = [row.fields["seed"] + image for row in rows for image in range(2)]
    assert seeds == list(range(10, 10 + len(seeds)))


def test_prompt_with_a_seed_of_its_own_keeps_it_and_its_place() -> None:
    rows = ({"prompt": "a"}, {"prompt": "b", "seed": 3, "num_images": 4}, {"prompt": "c"})
    load = Load(tuple(map(Prompt, rows)), requests=4, seed=100)
    assert [load.request(index)[0].fields["seed"] for index in range(4)] == [100, 3, 105, 106]
