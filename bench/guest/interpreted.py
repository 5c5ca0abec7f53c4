"""interpreted.py ROUNDS: ordinary Python: objects, dictionaries, strings, sorting, closures. Nothing but built-in modules."""

from __future__ import annotations

import sys


class Account:
    def __init__(self, number: int) -> None:
        self.number = number
        self.balance = 0
        self.history: list[int] = []

    def deposit(self, amount: int) -> int:
        self.balance += amount
        self.history.append(amount)
        return self.balance


def words(seed: int, count: int) -> list[str]:
    out = []
    for _ in range(count):
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        out.append("w" + str(seed % 997))
    return out


def counted(text: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in text:
        counts[word] = counts.get(word, 0) + 1
    return counts


def queens(n: int) -> int:
    def place(row: int, columns: int, left: int, right: int) -> int:
        if row == n:
            return 1
        found = 0
        free = ~(columns | left | right) & ((1 << n) - 1)
        while free:
            bit = free & -free
            free ^= bit
            found += place(row + 1, columns | bit, (left | bit) << 1, (right | bit) >> 1)
        return found

    return place(0, 0, 0, 0)


def main() -> None:
    total = 0
    for number in range(int(sys.argv[1])):
        accounts = [Account(n) for n in range(50)]
        for n in range(3000):
            total += accounts[(n * 7 + number) % 50].deposit(n & 15)
        counts = counted(words(number, 4000))
        best = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:20]
        total += len(" ".join(f"{word}={count}" for word, count in best).replace("w", "").split("="))
        total += queens(6)
    print(total)


main()
