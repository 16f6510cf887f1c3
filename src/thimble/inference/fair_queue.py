"""Waiting requests, taken so that no customer waits for another's hundred.

Each customer has a count of what it was served; the next request is taken from the customer with the least (virtual
token counters; Sheng et al., Fairness in Serving Large Language Models, OSDI 2024, arXiv:2401.00588, algorithm 2).
"""

from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

READ_COST, WRITTEN_COST = 1, 2  # of a token of a prompt and of an answer, as in the paper


class FairQueue(Generic[T]):
    """Requests that wait, by customer: in order for each, in turns among them."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, deque[T]] = {}
        self._served: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[T]:
        return (item for items in self._waiting.values() for item in items)

    def add(self, customer: Hashable, item: T) -> None:
        """Take a request; a customer that comes back has no claim to the time when it did not wait."""
        if not self._waiting:
            self._served.clear()  # nobody has waited for what was served so far
        if customer not in self._waiting:
            least = min((self._served[other] for other in self._waiting), default=0)
            self._served[customer] = max(self._served.get(customer, 0), least)
            self._waiting[customer] = deque()
        self._waiting[customer].append(item)

    def first(self) -> T:
        """Whose turn it is; there is at least one."""
        return self._waiting[self._next()][0]

    def take(self) -> T:
        """The same, which waits no more."""
        customer = self._next()
        item = self._waiting[customer].popleft()
        self._drop_empty(customer)
        return item

    def remove(self, customer: Hashable, item: T) -> None:
        """Forget a request, if it waits."""
        if item in self._waiting.get(customer, ()):
            self._waiting[customer].remove(item)
            self._drop_empty(customer)

    def charge(self, customer: Hashable, cost: int) -> None:
        """Count what a customer was served."""
        self._served[customer] = self._served.get(customer, 0) + cost

    def _next(self) -> Hashable:
        return min(self._waiting, key=lambda customer: self._served[customer])  # the first of equals came first

    def _drop_empty(self, customer: Hashable) -> None:
        if not self._waiting[customer]:
            del self._waiting[customer]
