/* recv_many ENDPOINT: receive messages until the peer closes.
 *
 * Prints a line "BYTES DESCRIPTORS" for each message, followed by what each of its descriptors holds.
 */
#include "fdpass.h"

int main(int argc, char **argv)
{
    if (argc != 2)
        fail("usage: recv_many ENDPOINT");
    int sock = endpoint(argv[1]);
    static char data[1 << 16];
    int fds[MAX_FDS];
    size_t count;
    size_t size;
    while ((size = receive_message(sock, data, sizeof data, fds, &count)) > 0) {
        printf("%zu %zu\n", size, count);
        for (size_t i = 0; i < count; i++)
            print_contents(fds[i]);
    }
    close(sock);
    return 0;
}
