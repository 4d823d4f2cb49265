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

// Errors as JSON. The output of package encoding/json for an error is unpredictable:
// nothing for an error without exported fields, all certificates for an error of
// crypto/tls, the password for an error that has one in a field, and a failure for a
// panic with a func. So the errors in statistics are marshaled as their text.

// maxTold bounds the text of an error in JSON, in bytes.
const maxTold = 400

// errorText returns the text of err for a line of JSON.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	return cutShortly(textOf(err))
}

func cutShortly(text string) string {
	text = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) { // would take six bytes in JSON
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

// toldError wraps an error in a statistic.
type toldError struct{ err error }

func (e *toldError) Error() string                { return textOf(e.err) }
func (e *toldError) Unwrap() error                { return e.err }
func (e *toldError) MarshalText() ([]byte, error) { return []byte(errorText(e.err)), nil }

// inStats wraps err for a statistic.
func inStats(err error) error {
	if err == nil {
		return nil
	}
	return &toldError{err}
}

// MarshalJSON returns the fields of e, and its text as Error. Each text is one line of
// 400 bytes at most.
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

// LogValue returns the text of e.
func (e *Error) LogValue() slog.Value { return slog.StringValue(e.Error()) }

// MarshalText returns the text of e, 400 bytes at most.
func (e *PanicError) MarshalText() ([]byte, error) { return []byte(errorText(e)), nil }

// panicText returns the text of a panic's value. For a value that is not meant to be read
// it returns the type only, because the value's fields may be secret.
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
