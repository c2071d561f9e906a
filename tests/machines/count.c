/* A plugin of QEMU that prints how many instructions its machine has executed. Debian has no header for it: these are
 * declarations of version 1 of the documented interface. */
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>

struct block;
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*translated)(uint64_t id, struct block *));
size_t qemu_plugin_tb_n_insns(const struct block *);
void qemu_plugin_register_vcpu_tb_exec_inline(struct block *, int add, void *to, uint64_t amount);
void qemu_plugin_register_atexit_cb(uint64_t id, void (*finished)(uint64_t id, void *), void *);

int qemu_plugin_version = 1;
static uint64_t count;

static void translated(uint64_t id, struct block *block)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &count, qemu_plugin_tb_n_insns(block));
}

static void finished(uint64_t id, void *data)
{
    (void)id, (void)data;
    fprintf(stderr, "%" PRIu64 " instructions\n", count);
}

int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv);
int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, finished, NULL);
    return 0;
}
