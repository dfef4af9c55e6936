// Renders chat templates as Ollama does: a JSON list of {template, messages} in, a list of texts out.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content, Thinking string }

type conversation struct {
	Template string
	Messages []*message
}

func main() {
	var conversations []conversation
	check(json.NewDecoder(os.Stdin).Decode(&conversations))
	texts := []string{}
	for _, c := range conversations {
		parsed, err := template.New("").Option("missingkey=zero").Parse(c.Template)
		check(err)
		var text strings.Builder
		check(parsed.Execute(&text, map[string]any{"Messages": c.Messages, "Response": ""}))
		texts = append(texts, text.String())
	}
	check(json.NewEncoder(os.Stdout).Encode(texts))
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
