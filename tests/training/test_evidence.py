"""What is advised where validation rows are too few: it can be done, and is enough."""

import pytest

from thimble.data.media.items import Item, split_items
from thimble.training.evidence import way_to_more
from thimble.training.guard import LEAST_TO_STOP


@pytest.mark.parametrize(
    ("rows", "has_file", "given", "labels", "way"),
    [
        (60, False, 0.1, 0, "--valid-split 0.2 holds enough of them out"),
        (60, True, 0.1, 0, "add rows to the valid file"),
        (12, False, 0.1, 0, "give at least 20 rows, no two of them the same, and --valid-split 0.5"),
        (40, False, 0.5, 0, "give at least 20 rows, no two of them the same, and --valid-split 0.5"),
        (24, False, 0.1, 20, "give at least 30 rows, no two of them the same, and --valid-split 0.5"),
        (24, False, 0.1, 14, "--valid-split 0.45 holds enough of them out"),
    ],
)
def test_the_way_to_more_validation_rows_is_one_that_leads_there(rows, has_file, given, labels, way):
    assert way_to_more(rows, has_file, given, labels) == way


@pytest.mark.parametrize(("labels", "each"), [(3, 4), (14, 2), (20, 2), (5, 5), (9, 8)])
def test_what_is_advised_for_small_classes_holds_enough_out(labels, each):
    def held(count, share):
        items = [Item(None, str(n), label=str(n % labels), digest=str(n)) for n in range(count)]
        return len(split_items(items, share, 0)[1])

    way = way_to_more(labels * each, False, 0.1, labels).split()
    count = labels * each if way[0] == "--valid-split" else int(way[3])
    share = float(way[1] if way[0] == "--valid-split" else way[-1])
    assert held(count, share) >= LEAST_TO_STOP
