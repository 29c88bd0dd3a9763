package dev.pocketvlm

import java.io.File

/** The C API of `runners/cpp`, as `jni.cc` hands it on. Texts are UTF-8. */
internal object Native {
    /** Takes pieces of an answer. */
    interface Listener {
        fun onPiece(text: ByteArray)
    }

    /** Loads the libraries: those of the app, or those in a folder. */
    @JvmStatic
    fun load(folder: File?) {
        if (folder == null) {
            System.loadLibrary("pocketvlm-jni")
            return
        }
        System.load(File(folder, System.mapLibraryName("pocketvlm")).absolutePath)
        System.load(File(folder, System.mapLibraryName("pocketvlm-jni")).absolutePath)
    }

    @JvmStatic
    external fun open(bundle: ByteArray, library: ByteArray, threads: Int): Long

    @JvmStatic
    external fun chooseVision(handle: Long, visualTokens: Int, width: Int, height: Int)

    @JvmStatic
    external fun encodeAhead(handle: Long, picture: ByteArray)

    @JvmStatic
    external fun ask(
        handle: Long,
        rendered: ByteArray,
        pictures: Array<ByteArray>,
        maxNewTokens: Int,
        listener: Listener
    )

    @JvmStatic
    external fun reset(handle: Long)

    @JvmStatic
    external fun close(handle: Long)

    @JvmStatic
    external fun runJob(job: ByteArray, library: ByteArray, descriptor: Int): Int
}
