/* send_many ENDPOINT BATCH TIMES FILE...
 *
 * Opens each FILE TIMES times over and sends all those descriptors, in order, BATCH to a message (the last may be
 * smaller).  The data of a message is one byte, the number of its descriptors.
 */
#include "fdpass.h"

int main(int argc, char **argv)
{
    if (argc < 5)
        fail("usage: send_many ENDPOINT BATCH TIMES FILE...");
    int sock = endpoint(argv[1]);
    size_t batch = (size_t)number(argv[2]);
    long times = number(argv[3]);
    if (batch < 1 || batch > MAX_FDS)
        fail("batch: 1 to 253");

    int fds[MAX_FDS];
    size_t held = 0;
    long files = argc - 4;
    for (long i = 0; i < times * files; i++) {
        fds[held++] = open_for_reading(argv[4 + i % files]);
        if (held < batch && i + 1 < times * files)
            continue;
        unsigned char data = (unsigned char)held;
        send_message(sock, &data, 1, fds, held);
        while (held > 0)
            close(fds[--held]);
    }
    close(sock);
    return 0;
}
