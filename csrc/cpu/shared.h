// Marks what cells that are loaded at run time call in this library, see cell_module.h.
#pragma once

#define FASTRNN_SHARED __attribute__((visibility("default")))
