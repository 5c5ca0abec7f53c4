/* text MEBIBYTES: writes text that compresses about as prose does: words by a skewed choice out of 4096, always the same. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint32_t state = 2463534242u;

static uint32_t next(void)
{
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

int main(int argc, char **argv)
{
    static char words[4096][12];
    long left = (argc > 1 ? atol(argv[1]) : 1) << 20;
    for (int n = 0; n < 4096; n++) {
        int size = 2 + next() % 8;
        for (int at = 0; at < size; at++)
            words[n][at] = 'a' + next() % 26;
    }
    while (left > 0) {
        uint32_t choice = next() & next() & 4095;
        left -= printf("%s%c", words[choice], next() % 11 ? ' ' : '\n');
    }
    return 0;
}
