// What the headers of newer compilers call and the libraries of manylinux_2_28 (glibc 2.28,
// libstdc++ of GCC 8) do not have, for FASTRNN_PORTABLE: hidden, so that it serves this library
// alone. Under older headers nothing calls it.
#include <new>

#define FASTRNN_AS(name) __asm__(name) __attribute__((visibility("hidden")))

extern "C" {

// glibc 2.32: may reference counts do without atomic instructions? No is always right.
extern char __libc_single_threaded __attribute__((visibility("hidden")));
char __libc_single_threaded = 0;

// GCC 11: std::__throw_bad_array_new_length().
[[noreturn]] void fastrnn_bad_length() FASTRNN_AS("_ZSt28__throw_bad_array_new_lengthv");
void fastrnn_bad_length() { throw std::bad_array_new_length(); }

// GCC 11: std::exception_ptr's _M_addref() and _M_release(), inside what every version exports, its
// copy constructor and destructor. The version keeps the linker from their new, inline forms.
void fastrnn_copy(void* target, const void* source) noexcept;
void fastrnn_destroy(void* target) noexcept;
__asm__(".symver fastrnn_copy, _ZNSt15__exception_ptr13exception_ptrC1ERKS0_@CXXABI_1.3.3");
__asm__(".symver fastrnn_destroy, _ZNSt15__exception_ptr13exception_ptrD1Ev@CXXABI_1.3.3");

void fastrnn_add(void* self) noexcept
    FASTRNN_AS("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void fastrnn_add(void* self) noexcept {
  void* never_destroyed;
  fastrnn_copy(&never_destroyed, self);
}

void fastrnn_release(void* self) noexcept
    FASTRNN_AS("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void fastrnn_release(void* self) noexcept { fastrnn_destroy(self); }

}  // extern "C"
