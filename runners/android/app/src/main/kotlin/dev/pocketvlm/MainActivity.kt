package dev.pocketvlm

import android.app.Activity
import android.content.Intent
import android.os.Bundle
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.TextView
import java.io.File
import java.util.concurrent.Executors

/**
 * One question about one picture. The bundle lies in the app's folder (`files/bundle`), with
 * `files/prompt.txt`: what the chat template makes of a question, `{question}` in its place.
 */
class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor()
    private lateinit var question: EditText
    private lateinit var answer: TextView

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        Native.load(null)
        question = EditText(this).apply { hint = getString(R.string.question) }
        answer = TextView(this)
        val pick = Button(this).apply {
            text = getString(R.string.pick)
            setOnClickListener {
                val picture = Intent(Intent.ACTION_GET_CONTENT).setType("image/*")
                startActivityForResult(picture, PICTURE)
            }
        }
        setContentView(LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            addView(question)
            addView(pick)
            addView(answer)
        })
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        super.onActivityResult(request, result, data)
        val picture = data?.data ?: return
        val words = question.text.toString()
        answer.text = ""
        worker.execute {
            try {
                val bytes = contentResolver.openInputStream(picture)!!.use { it.readBytes() }
                val prompt = File(filesDir, "prompt.txt").readText().replace("{question}", words)
                Conversation(File(filesDir, "bundle")).use { conversation ->
                    conversation.ask(prompt, listOf(bytes)) { piece ->
                        runOnUiThread { answer.append(piece) }
                    }
                }
            } catch (error: Exception) {
                runOnUiThread { answer.text = error.message }
            }
        }
    }

    override fun onDestroy() {
        super.onDestroy()
        worker.shutdown()
    }

    private companion object {
        const val PICTURE = 1
    }
}
