/* send_one ENDPOINT FILE: open FILE and send its descriptor with one byte of data, 'F'. */
#include "fdpass.h"

int main(int argc, char **argv)
{
    if (argc != 3)
        fail("usage: send_one ENDPOINT FILE");
    int sock = endpoint(argv[1]);
    int fd = open_for_reading(argv[2]);
    send_message(sock, "F", 1, &fd, 1);
    close(fd);
    close(sock);
    return 0;
}
