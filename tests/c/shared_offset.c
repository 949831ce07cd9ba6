/* shared_offset ENDPOINT give FILE | shared_offset ENDPOINT take
 *
 * Both sides hold one open file description, hence one offset; each reads four bytes of it in turn:
 *
 *   give  reads 4, sends the descriptor            take  reads 4, answers with one byte
 *   give  prints its offset, reads 4 and prints    take  done
 */
#include "fdpass.h"

static void read_four(int fd, const char *who)
{
    char four[4];
    long before = (long)lseek(fd, 0, SEEK_CUR);
    ssize_t got = read(fd, four, sizeof four);
    if (before < 0 || got < 0)
        die("file");
    printf("%s at %ld: %.*s\n", who, before, (int)got, four);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    if (argc < 3)
        fail("usage: shared_offset ENDPOINT give FILE | shared_offset ENDPOINT take");
    int sock = endpoint(argv[1]);
    int fds[MAX_FDS];
    size_t count;
    char data;
    if (strcmp(argv[2], "give") == 0 && argc == 4) {
        int fd = open_for_reading(argv[3]);
        read_four(fd, "give");
        send_message(sock, "F", 1, &fd, 1);
        if (receive_message(sock, &data, 1, fds, &count) != 1)
            fail("the peer went away");
        read_four(fd, "give");
        close(fd);
    } else if (strcmp(argv[2], "take") == 0 && argc == 3) {
        if (receive_message(sock, &data, 1, fds, &count) != 1 || count != 1)
            fail("expected one descriptor");
        read_four(fds[0], "take");
        send_message(sock, "R", 1, NULL, 0);
        close(fds[0]);
    } else {
        fail("role: give FILE, or take");
    }
    close(sock);
    return 0;
}
