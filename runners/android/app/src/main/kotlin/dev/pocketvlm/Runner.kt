package dev.pocketvlm

import java.io.File
import kotlin.system.exitProcess

/**
 * Does one job of the line protocol, read from `--job FILE` or from standard input.
 *
 * `--libraries FOLDER` names the folder of the libraries, where no app has loaded them, and
 * `--onnxruntime FILE` that of ONNX Runtime.
 */
fun main(words: Array<String>) {
    val options = HashMap<String, String>()
    for (at in words.indices step 2) {
        val known = words[at] == "--job" || words[at] == "--libraries" || words[at] == "--onnxruntime"
        if (!known || at + 1 == words.size) {
            System.err.println("error: ${words[at]} is not understood, or has no value")
            exitProcess(2)
        }
        options[words[at]] = words[at + 1]
    }
    val job = options["--job"]?.let { File(it).readBytes() } ?: System.`in`.readBytes()
    Native.load(options["--libraries"]?.let { File(it) })
    val library = options["--onnxruntime"] ?: ""
    exitProcess(Native.runJob(job, library.toByteArray(), STANDARD_OUTPUT))
}

private const val STANDARD_OUTPUT = 1
