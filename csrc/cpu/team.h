// Threads: a team on torch's OpenMP pool, and phases of work that its members take as they come.
// Compiled once, without any instruction set beyond the baseline.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastrnn {

// A thread on its way through the phases of a scan.
struct Member {
  int rank, size;   // its own parts of a phase are share(count, rank, size)
  bool is_patient;  // leaves the parts of others to them for a while
  bool took_over = false, took_over_before = false;  // a part of another, in this phase or the last
  uint32_t phase = 0;
  uint32_t done_before = 0;  // parts of all phases before this one
};

// Work that is cut into phases, and each phase into parts that may run in any order and on any
// thread. All members run through the same sequence of phases. A phase begins when the parts of the
// one before are done, no matter by whom: a member that comes late skips what is over and takes
// part in the rest, and nobody ever waits for a member that has not begun a part.
//
// Patient members split work for good reason (a thread's weights stay in its cache), and take over
// parts of others only after some microseconds; from then on at once, until the others are back.
class Phases {
 public:
  // Once, before any member begins: memory for as many parts as a phase has at most, aligned to a
  // cache line. Its contents are team.cc's matter, as <atomic> takes long to compile.
  static size_t bytes(int parts);
  void set_memory(void* memory, int parts);

  // A part of the member's phase, of `count`, that it has to run now and to report as done. Or -1
  // when all are done, everything they wrote can be read, and the member is at its next phase.
  int next_part(Member& member, int count);
  // The same in the last phase, where -1 means only that all parts have begun: that they are done
  // is known when run_team returns.
  int next_part_of_last(const Member& member, int count);
  void done(const Member& member, int part, int count);

 private:
  bool begin_part(int part, uint32_t phase);
  int begin_own(const Member& member, int count);
  int begin_any(const Member& member, int count);

  // Many threads that report to one counter wait for its cache line, one after the other: so they
  // report in groups, and only the last of each group goes on to the counter of all.
  static constexpr int kGroup = 8;

  struct PartState;
  struct State;
  State* state_ = nullptr;
  PartState* parts_ = nullptr;
};

// Runs work(context, rank) for rank 0 on the caller and for others below `threads` on other
// threads, as many as come: `work` has to do without any of them, and returns on the caller when
// all is done. No other thread is inside when this returns.
void run_team(int threads, void (*work)(void* context, int rank), void* context);

}  // namespace fastrnn
