/* recv_one ENDPOINT: receive one descriptor and print what it holds; says on stderr what data came along. */
#include "fdpass.h"

int main(int argc, char **argv)
{
    if (argc != 2)
        fail("usage: recv_one ENDPOINT");
    int sock = endpoint(argv[1]);
    char data[256];
    int fds[MAX_FDS];
    size_t count;
    size_t size = receive_message(sock, data, sizeof data, fds, &count);
    if (count != 1) {
        fprintf(stderr, "received %zu bytes and %zu descriptors, expected one descriptor\n", size, count);
        return 1;
    }
    fprintf(stderr, "%.*s\n", (int)size, data);
    print_contents(fds[0]);
    close(sock);
    return 0;
}
