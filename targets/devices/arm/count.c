/* A plugin of qemu-user (TCG plugin API, versions 1 and 2) that counts the AArch64 instructions that ran, by class.

   The guest tells where a stretch begins and ends: getpriority(MARK, n) is a system call that every Linux refuses (MARK is
   no `which`) and that nothing else makes. At each mark the counts since the one before are appended to the file that
   the plugin's argument `out=` names, as one line "n total dot mmla fma".

   Counts are added where a translated block is entered, without locks: exact for one thread.
   Encodings: Arm Architecture Reference Manual for A-profile, C4.1 (the index by encoding).  The declarations below are
   those of qemu's include/qemu/qemu-plugin.h, which Debian does not package. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MARK 0x5eed
#define NR_GETPRIORITY 141 /* asm-generic/unistd.h */

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;

extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int add_u64, void *, uint64_t);
extern void qemu_plugin_register_vcpu_syscall_cb(
    plugin_id, void (*)(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                        uint64_t, uint64_t));

EXPORT int qemu_plugin_version = 1;

enum { TOTAL, DOT, MMLA, FMA, CLASSES };
static uint64_t counts[CLASSES];
static char out[4096];

static int class_of(uint32_t word) {
  if ((word & 0x9fe0fc00) == 0x0e809400) return DOT;  /* SDOT, UDOT (vector) */
  if ((word & 0x9fc0f400) == 0x0f80e000) return DOT;  /* SDOT, UDOT (by element) */
  if ((word & 0xbfe0fc00) == 0x0e809c00) return DOT;  /* USDOT (vector) */
  if ((word & 0xffe0fc00) == 0x4e80a400) return MMLA; /* SMMLA */
  if ((word & 0xffe0fc00) == 0x6e80a400) return MMLA; /* UMMLA */
  if ((word & 0xffe0fc00) == 0x4e80ac00) return MMLA; /* USMMLA */
  if ((word & 0xbfa0fc00) == 0x0e20cc00) return FMA;  /* FMLA (vector), single and double */
  if ((word & 0xbfe0fc00) == 0x0e400c00) return FMA;  /* FMLA (vector), half */
  if ((word & 0xbf80f400) == 0x0f801000) return FMA;  /* FMLA (by element), single and double */
  return TOTAL;
}

static void translated(plugin_id id, struct qemu_plugin_tb *block) {
  size_t length = qemu_plugin_tb_n_insns(block);
  uint64_t found[CLASSES] = {0};
  found[TOTAL] = length;
  for (size_t i = 0; i < length; i++) {
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
    int class = class_of(word);
    if (class != TOTAL) found[class]++;
  }
  for (int i = 0; i < CLASSES; i++)
    if (found[i]) qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &counts[i], found[i]);
}

static void called(plugin_id id, unsigned cpu, int64_t number, uint64_t which, uint64_t mark, uint64_t a3, uint64_t a4,
                   uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
  if (number != NR_GETPRIORITY || which != MARK) return;
  FILE *file = fopen(out, "a");
  if (file) {
    fprintf(file, "%llu", (unsigned long long)mark);
    for (int i = 0; i < CLASSES; i++) fprintf(file, " %llu", (unsigned long long)counts[i]);
    fputs("\n", file);
    fclose(file);
  }
  memset(counts, 0, sizeof counts);
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
  for (int i = 0; i < argc; i++)
    if (!strncmp(argv[i], "out=", 4)) snprintf(out, sizeof out, "%s", argv[i] + 4);
  if (!out[0]) return 1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, called);
  return 0;
}
