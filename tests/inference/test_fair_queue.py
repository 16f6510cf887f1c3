"""Turns: a customer with a hundred requests does not hold up one with a single one."""

from thimble.inference.fair_queue import FairQueue


def taken(queue, count, cost=10):
    """The next requests, each charged to the customer that its name begins with."""
    order = []
    for _ in range(count):
        order.append(queue.take())
        queue.charge(order[-1][0], cost)
    return order


def filled(**counts):
    queue = FairQueue()
    for customer, count in counts.items():
        for number in range(count):
            queue.add(customer, f"{customer}{number}")
    return queue


def test_requests_of_one_customer_come_in_order():
    assert taken(filled(a=5), 5) == ["a0", "a1", "a2", "a3", "a4"]


def test_customers_take_turns():
    assert taken(filled(a=100, b=2, c=1), 6) == ["a0", "b0", "c0", "a1", "b1", "a2"]


def test_whoever_was_served_most_waits():
    queue = filled(a=9, b=9)
    queue.charge("a", 35)
    assert taken(queue, 6) == ["b0", "b1", "b2", "b3", "a0", "b4"]


def test_a_late_customer_is_next_but_has_no_claim_to_the_past():
    queue = filled(a=100, b=100)
    taken(queue, 50)
    for number in range(10):
        queue.add("c", f"c{number}")
    found = taken(queue, 12)
    assert [sum(name.startswith(customer) for name in found) for customer in "abc"] == [4, 4, 4]
    assert "c0" in found[:3]


def test_what_was_served_before_everybody_had_gone_counts_for_nothing():
    queue = filled(a=50)
    taken(queue, 50)
    queue.add("a", "a50")
    queue.add("b", "b0")
    assert taken(queue, 2) == ["a50", "b0"]
    assert len(queue._served) == 2


def test_what_is_removed_does_not_come():
    queue = filled(a=3, b=1)
    queue.remove("a", "a1")
    queue.remove("b", "b0")
    queue.remove("c", "c0")
    assert len(queue) == 2
    assert taken(queue, 2) == ["a0", "a2"]
    assert not queue
