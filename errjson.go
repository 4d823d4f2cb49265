package connpool

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Errors as JSON. What package encoding/json makes of an error is chance: nothing
// of one without exported fields, certificates and all of one of crypto/tls, a
// password of one that has it for a field, and no JSON at all of a panic with a
// func. So the errors that come with statistics are marshaled as their text.

// maxTold bounds the text of an error in JSON, in bytes.
const maxTold = 400

// errorText is the text of err for a line of JSON.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	return cutShortly(textOf(err))
}

func cutShortly(text string) string {
	text = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) { // takes six bytes in JSON
			return '?'
		}
		return r
	}, text)
	if len(text) <= maxTold {
		return text
	}
	end := maxTold
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + "..."
}

// toldError is an error of a statistic.
type toldError struct{ err error }

func (e *toldError) Error() string                { return textOf(e.err) }
func (e *toldError) Unwrap() error                { return e.err }
func (e *toldError) MarshalText() ([]byte, error) { return []byte(errorText(e.err)), nil }

// inStats is err as a statistic has it.
func inStats(err error) error {
	if err == nil {
		return nil
	}
	return &toldError{err}
}

// MarshalJSON gives the fields of e, and its text as Error. Each text is one line
// of 400 bytes at most.
func (e *Error) MarshalJSON() ([]byte, error) {
	addr := ""
	if e.Addr != (Addr{}) {
		addr = e.Addr.String()
	}
	return json.Marshal(struct {
		Error                      string
		Addr                       string `json:",omitempty"`
		Stage                      string
		Kind                       Kind
		Waited                     time.Duration
		Open, InUse, Idle, Waiting int
		Limit                      int
		LimitName                  string
		Err                        string
	}{errorText(e), addr, e.Stage.String(), e.Kind, e.Waited, e.Open, e.InUse, e.Idle, e.Waiting, e.Limit, e.LimitName, errorText(e.Err)})
}

// LogValue is the text of e.
func (e *Error) LogValue() slog.Value { return slog.StringValue(e.Error()) }

// MarshalText gives the text of e, 400 bytes at most.
func (e *PanicError) MarshalText() ([]byte, error) { return []byte(errorText(e)), nil }

// panicText is what a value says that somebody panicked with. Of one that was not
// made to be read, the type has to do: its fields may be secret.
func panicText(v any) string {
	switch v := v.(type) {
	case error, fmt.Stringer, string:
		return fmt.Sprint(v)
	}
	switch k := reflect.TypeOf(v).Kind(); {
	case k >= reflect.Bool && k <= reflect.Complex128, k == reflect.String:
		return fmt.Sprint(v)
	}
	return fmt.Sprintf("a value of type %T", v)
}
