/* The program that `calls exec` starts: what it takes is the kernel's execve, the C library's start and its end. */
int main(void)
{
    return 0;
}
