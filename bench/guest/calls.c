/* calls WHAT COUNT: programs that mostly ask the kernel for things.
 *   exec   start the program `nothing` beside this one and wait for it
 *   fork   fork, let the child write some of its parent's pages, wait for it
 *   pipe   hand one byte back and forth between two processes
 *   files  small system calls on files: stat, open, read, seek, write, close
 *   pages  map, touch and unmap memory */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void check(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

static void ended(pid_t child)
{
    int status;
    check(waitpid(child, &status, 0) == child && status == 0, "child");
}

static void execs(long count)
{
    static char path[] = "/bench/nothing";
    char *argv[] = {path, NULL}, *environment[] = {NULL};
    while (count--) {
        pid_t child = fork();
        check(child >= 0, "fork");
        if (child == 0) {
            execve(path, argv, environment);
            _exit(127);
        }
        ended(child);
    }
}

static void forks(long count)
{
    static char pages[64][4096];
    memset(pages, 1, sizeof pages);
    while (count--) {
        pid_t child = fork();
        check(child >= 0, "fork");
        if (child == 0) {
            for (int n = 0; n < 64; n += 4)
                pages[n][0]++;
            _exit(0);
        }
        ended(child);
    }
}

static void pipes(long count)
{
    int there[2], back[2];
    char byte = 0;
    check(pipe(there) == 0 && pipe(back) == 0, "pipe");
    pid_t child = fork();
    check(child >= 0, "fork");
    for (long n = 0; n < count; n++) {
        if (child == 0) {
            check(read(there[0], &byte, 1) == 1 && write(back[1], &byte, 1) == 1, "pipe");
        } else {
            check(write(there[1], &byte, 1) == 1 && read(back[0], &byte, 1) == 1, "pipe");
        }
    }
    if (child == 0)
        _exit(0);
    ended(child);
}

static void files(long count)
{
    static char data[4096];
    const char *path = "/tmp/calls";
    struct stat status;
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    check(file >= 0 && write(file, data, sizeof data) == sizeof data, path);
    while (count--) {
        check(syscall(SYS_getppid) > 0, "getppid");
        check(stat(path, &status) == 0, path);
        int again = open(path, O_RDONLY);
        check(again >= 0 && read(again, data, sizeof data) == sizeof data && close(again) == 0, path);
        check(lseek(file, 512, SEEK_SET) == 512 && write(file, data, 512) == 512, path);
    }
    unlink(path);
}

static void pages(long count)
{
    while (count--) {
        size_t size = 32 * 4096;
        char *where = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        check(where != MAP_FAILED, "mmap");
        for (size_t at = 0; at < size; at += 4096)
            where[at] = 1;
        check(munmap(where, size) == 0, "munmap");
    }
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(long);
    } all[] = {{"exec", execs}, {"fork", forks}, {"pipe", pipes}, {"files", files}, {"pages", pages}};
    for (size_t n = 0; argc == 3 && n < sizeof all / sizeof *all; n++) {
        if (strcmp(argv[1], all[n].name) == 0) {
            all[n].run(atol(argv[2]));
            return 0;
        }
    }
    return 2;
}
