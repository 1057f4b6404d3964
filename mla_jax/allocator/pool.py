"""The state of every page: its reference count, its key, and the page to copy into it."""

import collections


class PagePool:
    """The pages of a cache, without the requests that have them.

    A page is in one of three states:
    - held: `ref_counts` counts the requests that have it.
    - evictable: no request has it, but a lookup finds it by its key.
    - free: no request has it, and it has no key.

    Free pages are taken in last-in, first-out order, while they are still in a processor's cache.
    If none is free, the evictable page that was released first is taken and loses its key. Every
    method takes O(1) time.
    """

    def __init__(self, num_pages: int) -> None:
        self.ref_counts = [0] * num_pages
        self.free = list(reversed(range(num_pages)))
        self.evictable: collections.OrderedDict[int, None] = collections.OrderedDict()
        self.page_of_key: dict[bytes, int] = {}
        self.key_of_page: dict[int, bytes] = {}
        # Target to source. A source is a page as it is before any of these copies.
        self.copies: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """The number of pages that can be taken."""
        return len(self.free) + len(self.evictable)

    def take(self) -> int:
        """Returns a page with a reference count of 1; one must be free or evictable."""
        if self.free:
            page = self.free.pop()
        else:
            page, _ = self.evictable.popitem(last=False)
            self.forget(page)
        self.ref_counts[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Adds a reference to a page that is held or evictable."""
        if not self.ref_counts[page]:
            del self.evictable[page]
        self.ref_counts[page] += 1

    def release(self, page: int) -> None:
        """Removes a reference from a page that is held."""
        self.ref_counts[page] -= 1
        if self.ref_counts[page]:
            return
        if page in self.key_of_page:
            self.evictable[page] = None
        else:
            self.copies.pop(page, None)
            self.free.append(page)

    def copy_of(self, page: int) -> int:
        """Takes a page for a copy of `page`, and moves one reference from `page` to it."""
        new = self.take()
        # A page that is itself still to be copied has its content where it is copied from.
        self.copies[new] = self.copies.get(page, page)
        self.release(page)
        return new

    def register(self, page: int, key: bytes) -> None:
        """Makes a held page the one that a key finds, unless the key finds one already."""
        if key not in self.page_of_key:
            self.page_of_key[key] = page
            self.key_of_page[page] = key

    def forget(self, page: int) -> None:
        """Removes the key of a page that may have one."""
        key = self.key_of_page.pop(page, None)
        if key is not None:
            del self.page_of_key[key]

    def copy(self) -> "PagePool":
        """Returns an independent copy."""
        other = object.__new__(PagePool)
        other.__dict__.update({name: value.copy() for name, value in self.__dict__.items()})
        return other
