# For 64-bit ARM Linux, from any Linux that has Debian's g++-aarch64-linux-gnu.
#
# ARM64_ROOT is a folder into which Debian's arm64 packages of libjpeg62-turbo, libpng16-16 and
# zlib1g, and their -dev packages, were unpacked (dpkg-deb --extract).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)

list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ARM64_ROOT)
set(CMAKE_FIND_ROOT_PATH ${ARM64_ROOT})
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_CXX_FLAGS_INIT "-isystem ${ARM64_ROOT}/usr/include/aarch64-linux-gnu")
set(CMAKE_EXE_LINKER_FLAGS_INIT
  "-Wl,-rpath-link,${ARM64_ROOT}/lib/aarch64-linux-gnu:${ARM64_ROOT}/usr/lib/aarch64-linux-gnu")
