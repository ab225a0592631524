"""Which explicit step a decode equals, and which block claims which step."""

from rim_probe.probing.matches import claims, decodes, explicit_steps


def decode(block, step, text, gold, others=()):
    near = [{"step": text, "cosine": 0.9, "gold": gold}]
    return {"block": block, "step": step, "accuracy": 0.6, "nearest": near, "others": list(others)}


def reading(*blocks, steps=("<<3+4=7>>", "<<7-2=5>>"), chain=("<<3+4=7>>", "<<7-2=5>>")):
    return {"steps": list(steps), "chain": {"steps": list(chain)}, "probes": {"steps": {"blocks": list(blocks)}}}


BLOCKS = (decode(1, 1, "<<3+4=7>>", 1), decode(2, 2, "<<3+4=7>>", 1), decode(3, 2, "<<9-2=7>>", 0))


def test_a_block_claims_a_step_only_where_it_is_read_as_the_step_it_was_read_for():
    found = decodes(reading(*BLOCKS))
    assert {block: (one.row, one.gold, one.exact) for block, one in found.items()} == {
        1: (0, 1, True),
        2: (0, 1, False),
        3: (None, 0, False),
    }
    assert claims(reading(*BLOCKS)) == {1: 1}


def test_all_blocks_can_be_read_for_one_step():
    other = decode(3, 1, "<<3+4=7>>", 1)
    found = decodes(reading(BLOCKS[0], decode(3, 2, "<<9-2=7>>", 0, [other])), "1")
    assert {block: one.nearest[0][0] for block, one in found.items()} == {1: "3+4=7", 3: "3+4=7"}


def test_without_a_known_solution_the_steps_of_the_chain_are_the_claims():
    unknown = [{**block, "nearest": [{**block["nearest"][0], "gold": None}]} for block in BLOCKS]
    assert claims(reading(*unknown, steps=())) == {1: 1}


def test_the_solution_completes_a_wrong_chain():
    rows = explicit_steps(reading(chain=("<<3+4=8>>", "<<7-2=5>>")))
    told = [(row.text, row.written, row.gold) for row in rows]
    assert told == [("3+4=8", True, 0), ("7-2=5", True, 2), ("3+4=7", False, 1)]


def test_the_same_step_twice_goes_to_the_one_it_was_read_for():
    twice = ("<<3+4=7>>", "<<3+4=7>>")
    one = decodes(reading(decode(1, 2, "<<3+4=7>>", 1), steps=twice, chain=twice))[1]
    assert one.row == 1 and one.exact


def test_steps_that_a_decode_cannot_name_count_against_it():
    one = decodes(reading({**BLOCKS[0], "coverage": 0.5}))[1]
    assert one.accuracy == 0.6 and one.right == 0.3
