/* Start-up of a bare Cortex-M under QEMU, and its host's standard input, output and exit status by semihosting. */
#include <stdint.h>

extern uint32_t stack_top, data_load, data_start, data_end, bss_start, bss_end;
int main(void);
int get(void);
int put(int byte);

enum { OPEN = 0x01, WRITE = 0x05, READ = 0x06, EXIT_EXTENDED = 0x20 };

static int32_t host(int32_t operation, const void *arguments)
{
    register int32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = arguments;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static intptr_t opened(const char *path, int mode, int length)
{
    const intptr_t arguments[] = {(intptr_t)path, mode, length};
    return host(OPEN, arguments);
}

static char in[256], out[256];
static intptr_t input, output;
static int here, left, waiting;

int get(void)
{
    if (left == 0) {
        const intptr_t arguments[] = {input, (intptr_t)in, sizeof in};
        left = (int)sizeof in - (int)host(READ, arguments); /* which returns how many it did not read */
        here = 0;
        if (left == 0) return -1;
    }
    left--;
    return (unsigned char)in[here++];
}

static void flush(void)
{
    const intptr_t arguments[] = {output, (intptr_t)out, waiting};
    host(WRITE, arguments);
    waiting = 0;
}

int put(int byte)
{
    out[waiting++] = (char)byte;
    if (waiting == sizeof out) flush();
    return byte;
}

static void leave(int status)
{
    const intptr_t arguments[] = {0x20026, status}; /* ADP_Stopped_ApplicationExit */
    flush();
    for (;;) host(EXIT_EXTENDED, arguments);
}

void reset(void);
void reset(void)
{
#ifdef __ARM_FP
    *(volatile uint32_t *)0xe000ed88u |= 0xfu << 20; /* CPACR: the floating-point unit may be used */
    __asm__ volatile("dsb\n isb");
#endif
    for (uint32_t *from = &data_load, *to = &data_start; to < &data_end;) *to++ = *from++;
    for (uint32_t *to = &bss_start; to < &bss_end;) *to++ = 0;
    input = opened("/dev/stdin", 0, 10);
    output = opened("/dev/stdout", 4, 11);
    leave(main());
}

static void fault(void)
{
    leave(99);
}

__attribute__((section(".vectors"), used)) static const struct {
    const void *stack;
    void (*handlers[6])(void);
} vectors = {&stack_top, {reset, fault, fault, fault, fault, fault}};
