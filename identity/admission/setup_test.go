package admission

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	ctrladmission "sigs.k8s.io/controller-runtime/pkg/webhook/admission"
)

// Nobody makes the webhook read without end, or leaves a request without a deadline.
func TestBounded(t *testing.T) {
	asked := false
	h := bounded(&ctrladmission.Webhook{Handler: ctrladmission.HandlerFunc(func(ctx context.Context, _ ctrladmission.Request) ctrladmission.Response {
		asked = true
		if _, ok := ctx.Deadline(); !ok {
			t.Error("no deadline")
		}
		return ctrladmission.Allowed("")
	})})
	send := func(body io.Reader) string {
		r := httptest.NewRequest(http.MethodPost, "/", body)
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Body.String()
	}
	for name, body := range map[string]io.Reader{
		"endless": endless{}, "rubbish": strings.NewReader("{"), "not JSON": strings.NewReader("\x00"),
	} {
		if got := send(body); !strings.Contains(got, `"allowed":false`) || asked {
			t.Errorf("%s: %.200s", name, got)
		}
	}
	review := `{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u"}}`
	if got := send(strings.NewReader(review)); !strings.Contains(got, `"allowed":true`) || !asked {
		t.Errorf("a review: %s", got)
	}
}

// endless is a body that never ends.
type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}
