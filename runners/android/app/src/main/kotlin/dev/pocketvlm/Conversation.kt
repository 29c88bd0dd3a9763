package dev.pocketvlm

import java.io.Closeable
import java.io.File

/**
 * A conversation about pictures with a bundle's ONNX graphs; used by one thread at a time.
 *
 * @param bundle the folder; names and shapes are read from its manifest.
 * @param library ONNX Runtime's library; `null` for the one of the app.
 * @param threads threads of the heavy graphs; 0 for one per physical core.
 * @throws IllegalStateException the bundle cannot be run; the message is one line.
 */
class Conversation(bundle: File, library: File? = null, threads: Int = 0) : Closeable {
    private var handle = Native.open(
        bundle.path.toByteArray(), (library?.path ?: "").toByteArray(), threads
    )

    /**
     * Chooses the vision graph that sees the pictures of later questions, where a bundle has several.
     *
     * @param visualTokens tokens of a tile; 0 for the first number that there is.
     * @param width of what the graph takes, with `height`; 0 for the size closest to a picture's
     *     ratio of sides.
     * @throws IllegalStateException there is no such graph; the choice is what it was.
     */
    fun chooseVision(visualTokens: Int = 0, width: Int = 0, height: Int = 0) {
        check(handle != 0L) { "the conversation is closed" }
        Native.chooseVision(handle, visualTokens, width, height)
    }

    /**
     * Encodes a picture of the next question before it is asked, as while a user types.
     *
     * The question's text has its marker, before those of the pictures that come with [ask].
     *
     * @param picture a JPEG or PNG file.
     * @throws IllegalStateException it cannot be read; nothing has changed then.
     */
    fun encodeAhead(picture: ByteArray) {
        check(handle != 0L) { "the conversation is closed" }
        Native.encodeAhead(handle, picture)
    }

    /**
     * Asks, and returns the answer.
     *
     * @param rendered the chat template's text of this turn and all before it, with a marker per
     *     picture and U+F0002 for every earlier answer.
     * @param pictures JPEG or PNG files that come with this turn.
     * @param onPiece takes each piece of the answer as soon as it is certain.
     * @throws IllegalStateException it cannot be answered; the conversation has started over then.
     */
    fun ask(
        rendered: String,
        pictures: List<ByteArray> = emptyList(),
        maxNewTokens: Int = 64,
        onPiece: (String) -> Unit = {}
    ): String {
        check(handle != 0L) { "the conversation is closed" }
        val answer = StringBuilder()
        val listener = object : Native.Listener {
            override fun onPiece(text: ByteArray) {
                val piece = String(text, Charsets.UTF_8)
                answer.append(piece)
                onPiece(piece)
            }
        }
        Native.ask(handle, rendered.toByteArray(), pictures.toTypedArray(), maxNewTokens, listener)
        return answer.toString()
    }

    /** Forgets every turn; the graphs stay loaded. */
    fun reset() {
        check(handle != 0L) { "the conversation is closed" }
        Native.reset(handle)
    }

    override fun close() {
        if (handle != 0L) Native.close(handle)
        handle = 0L
    }
}
